"""Pictures as their users have them: odd files that show every pixel, large ones, linked ones; and
corpora that nobody may write to, and file systems without locks."""

import errno
import fcntl
import io
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFilter

import hostile
import tools.check
import train
from engine import files
from engine.corpus import split_digest
from engine.features import FeatureCache
from engine.files import ImageError, UsageError, claim, locked
from engine.images import load_image, resolve_image
from engine.processes import verdict
from engine.schema import DataError
from engine.settings import Config, parse_arguments

NOISE = Image.frombytes("RGB", (40, 30), np.random.default_rng(0).bytes(40 * 30 * 3))
SCENE = NOISE.filter(ImageFilter.GaussianBlur(2))


def encoded(kind: str, image: Image.Image = SCENE, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(content: bytes, folder: Path) -> np.ndarray:
    (folder / "picture").write_bytes(content)
    return np.asarray(load_image(folder / "picture"))


# ------------------------------------------------------------------------------ odd metadata

def app1(payload: bytes) -> bytes:
    """A JPEG of the scene with such an APP1 segment."""
    plain = encoded("JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]


def tiff(*entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """EXIF with these tags: (number, type, count, value or offset)."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 0)
            + tail)


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))  # stored on its side
AFTER = struct.pack("<I", 38)  # where the tail of two entries begins
EXIF = {  # and whether the picture is turned upright
    "empty": (b"Exif\0\0", False), "garbage": (b"Exif\0\0" + b"\0\x08\0\x02\x01\x12\0\x03", False),
    "text": (b"Exif\0\0 photo by A. Nonymous  ", False), "none": (b"Exif\0\0II*\0", False),
    "a negative rational": (tiff(TURNED, (0x011A, 10, 1, AFTER), tail=struct.pack("<ii", -1, 0)),
                            True),
    "a rational by zero": (tiff(TURNED, (0x011A, 5, 1, AFTER), tail=bytes(8)), True),
    "a rational beyond the end": (tiff(TURNED, (0x011A, 5, 1, struct.pack("<I", 90000))), True),
    "a folder of another type": (tiff(TURNED, (0x8769, 3, 1, struct.pack("<HH", 7, 0))), True),
    "twice": (b"Exif\0\0" + tiff(TURNED), not PIL.__version__.startswith("10.")),  # since 11
    "cut": (tiff(TURNED, TURNED)[:-6], True),
    "orientation 9": (tiff((0x0112, 3, 1, struct.pack("<HH", 9, 0))), False),
    "orientation in words": (tiff((0x0112, 2, 4, b"six\0")), False),
    "orientation as a rational": (tiff((0x0112, 5, 1, struct.pack("<I", 26)),
                                       tail=struct.pack("<II", 6, 1)), True),
    "orientation by zero": (tiff((0x0112, 5, 1, struct.pack("<I", 26)),
                                 tail=struct.pack("<II", 6, 0)), False)}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the metadata
@pytest.mark.parametrize("name", EXIF)
def test_malformed_exif_costs_no_pixel(name: str, tmp_path: Path) -> None:
    """The orientation is taken from what is readable, else the picture stands as it is."""
    payload, turned = EXIF[name]
    plain = pixels(encoded("JPEG"), tmp_path)
    assert np.array_equal(pixels(app1(payload), tmp_path), np.rot90(plain, -1) if turned else plain)


def png_with(*extra: tuple[bytes, bytes], damaged: bool = False) -> bytes:
    """A PNG of the scene with more chunks (name, body) behind its header, each with a wrong sum if
    damaged."""
    whole, chunks = encoded("PNG"), [hostile.chunk(*one) for one in extra]
    chunks = [one[:-4] + b"\0bad" for one in chunks] if damaged else chunks
    return whole[:33] + b"".join(chunks) + whole[33:]


LONG = zlib.compress(bytes(1_500_000))
ODD_PNG = {
    "a long text": [(b"zTXt", b"workflow\0\0" + LONG)],
    "a long profile": [(b"iCCP", b"icc\0\0" + LONG)],
    "long metadata": [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)],
    "no profile": [(b"iCCP", b"junk")], "a short gamma": [(b"gAMA", b"\0\0")],
    "a short density": [(b"pHYs", b"\0")], "short colours": [(b"cHRM", b"")],
    "no EXIF": [(b"eXIf", b"junk")], "half an animation": [(b"acTL", b"\0\0\0\2\0\0\0\0")]}


@pytest.mark.parametrize("name", ODD_PNG)
def test_what_is_no_pixel_of_a_png_may_be_anything(name: str, tmp_path: Path) -> None:
    """Long or malformed text, profiles and the like, also with a wrong sum."""
    scene = np.asarray(SCENE)
    for damaged in (False, True):
        assert np.array_equal(pixels(png_with(*ODD_PNG[name], damaged=damaged), tmp_path), scene)


def test_the_orientation_of_a_mended_png_is_kept(tmp_path: Path) -> None:
    """Its EXIF is intact, the text beside it is not; EXIF with a wrong sum says nothing."""
    turned, text = (b"eXIf", tiff(TURNED)[6:]), (b"zTXt", b"workflow\0\0" + LONG)
    assert pixels(png_with(turned, text), tmp_path).shape == (40, 30, 3)
    assert pixels(png_with(turned, damaged=True), tmp_path).shape == (30, 40, 3)


def test_malformed_exif_of_a_webp_costs_no_pixel(tmp_path: Path) -> None:
    assert np.array_equal(pixels(encoded("WEBP", lossless=True, exif=b"Exif\0\0junk"), tmp_path),
                          np.asarray(SCENE))


JPEGS = {"baseline": {}, "progressive": {"progressive": True}, "grey": {},
         "restarts": {"restart_marker_blocks": 2}, "optimised": {"optimize": True, "quality": 30}}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_may_lack_its_end_mark_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Cut anywhere: read with the pixels of the whole, or refused; without the mark, read."""
    scene = SCENE.crop((0, 0, 24, 16)).convert("L" if name == "grey" else "RGB")
    whole = encoded("JPEG", scene, **JPEGS[name])
    expected, readable = pixels(whole, tmp_path), []
    for lost in range(len(whole) - 20):
        with suppress(ImageError):
            assert np.array_equal(pixels(whole[:len(whole) - lost], tmp_path), expected), lost
            readable.append(lost)
    assert readable == [0, 1, 2]  # 1: half of the mark is left


def test_a_jpeg_filled_up_to_its_length_is_refused(tmp_path: Path) -> None:
    """A download that was cut off, on a disk that had reserved the room: filler is no pixel."""
    whole = encoded("JPEG")
    for filler in (bytes(99), b"\xa5" * 99, b"<html>Bad Gateway</html>"):
        with pytest.raises(ImageError, match="expected a whole JPEG"):
            pixels(whole[:len(whole) // 2] + filler, tmp_path)


def test_a_picture_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png: expected a picture, got no file; correct"):
        load_image(tmp_path / "none.png")


def test_a_small_file_that_claims_many_pixels_is_refused(tmp_path: Path) -> None:
    """libjpeg would draw what is missing in grey."""
    with pytest.raises(ImageError, match=r"\(2000, 2000\) in (\d+) bytes, more than"):
        pixels(hostile.sized(encoded("JPEG"), 2000, 2000), tmp_path)
    flat = Image.new("RGB", (2000, 2000), (90, 120, 30))  # and these are the smallest that can
    for options in ({}, {"optimize": True, "quality": 1}, {"progressive": True, "quality": 1}):
        assert pixels(encoded("JPEG", flat, **options), tmp_path).shape == (2000, 2000, 3)
    assert pixels(hostile.png(2000, 2000, None), tmp_path).all()


# ------------------------------------------------------------------------------ large pictures

def corpus_with(root: Path, content: bytes, **record: object) -> Path:
    """A corpus with one record, of images/a.jpg; beside it a tower."""
    corpus = hostile.make_corpus(root, ["a.jpg"])
    (corpus / "tweets" / "images" / "a.jpg").write_bytes(content)
    row = hostile.ROWS[1] | {"id": "1", "objects": [], "image": "a.jpg", "size": None} | record
    (corpus / "tweets" / "train.jsonl").write_bytes(hostile.line(row) + b"\n")
    return corpus


def test_the_largest_published_picture_is_read(tmp_path: Path) -> None:
    """M2E2's VOA_EN_NW_2016.07.10.3411182_1.jpg: detections reach 7,948 x 4,445 pixels; check and
    training read it, and its boxes stand in the full picture."""
    corpus = corpus_with(tmp_path, encoded("JPEG", Image.new("L", (8000, 4500), 60)),
                         objects=[[5573.82, 2389.01, 7947.87, 4444.54]])
    tools.check.check(corpus, require_images=True)
    [record] = hostile.load_corpus(corpus, "train")
    places = hostile.features(corpus, "error")(record)[1]
    assert places[1, :4].tolist() == pytest.approx([5573.82 / 8000, 2389.01 / 4500, 7947.87 / 8000,
                                                    4444.54 / 4500])


def test_few_pictures_are_in_memory_at_once(tmp_path: Path) -> None:
    """Four, whatever the machine: each may have 128 megapixels."""
    at_once, most, requests = [], [], []
    tower = hostile.ViT.from_pretrained(hostile.tower(tmp_path / "vit"))

    def views(image: Image.Image, boxes: object) -> object:
        at_once.append(image)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()
        return hostile.ViT.views(tower, image, boxes)
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encoded("PNG", SCENE.rotate(number)))
        requests.append((tmp_path / f"{number}.png", [], None))
    tower.views = views
    FeatureCache(tower, "h", tmp_path / "cache").prepare(requests)
    assert 1 < max(most) <= 4


# ------------------------------------------------------------------------------ check and training

FAULTS = {"absent": None, "a folder": None, "a dangling link": None, "a page": b"<html>404</html>",
          "half": encoded("JPEG")[:400], "a claim": hostile.sized(encoded("JPEG"), 6000, 6000),
          "another size": encoded("JPEG", SCENE.resize((41, 30))),
          "a box outside": encoded("JPEG", SCENE.crop((0, 0, 20, 20)))}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_refuses_the_pictures_that_training_would_refuse(
        fault: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With --require-images, by file and line, and for the same reason."""
    size = [40, 30] if fault == "another size" else None
    corpus = corpus_with(tmp_path, FAULTS[fault] or b"", objects=[[10, 5, 39, 29]], size=size)
    path = corpus / "tweets" / "images" / "a.jpg"
    if FAULTS[fault] is None:
        path.unlink()
        if fault != "absent":
            path.mkdir() if fault == "a folder" else path.symlink_to("nowhere")
    tools.check.check(corpus, require_images=False)
    missing = fault in ("absent", "a dangling link")
    assert f"1 images ({missing:d} missing)" in capsys.readouterr().out
    checked = hostile.complaint(lambda: tools.check.check(corpus, True), DataError)
    trained = hostile.complaint(lambda: hostile.features(corpus, "error"), DataError, UsageError)
    if missing:
        assert f"train.jsonl:1: image: {path} is not there: put it there or write null" in checked
        assert f"missing, first {path} (" in trained
    else:
        assert checked == trained and f"train.jsonl:1: image: {path}: " in checked


@pytest.mark.parametrize("name", [*hostile.REFUSED_NAMES, None], ids=repr)
def test_a_name_that_leads_elsewhere_is_refused_by_itself(name: object, tmp_path: Path) -> None:
    """Whatever lies in the folder."""
    with pytest.raises(ImageError, match="expected a relative path"):
        resolve_image(tmp_path, name)


def test_linked_pictures_are_read_as_copies_are(tmp_path: Path) -> None:
    """A store, a hub snapshot's blob, a linked subfolder, a linked images/: check and training."""
    names = ["store.jpg", "blob.jpg", "sub/a.jpg", "chain.jpg"]
    corpus = hostile.make_corpus(tmp_path, [])
    place = corpus / "tweets" / "images"
    snapshot = tmp_path / "hub" / "snapshots" / "1" / "images"
    for folder in (tmp_path / "store", tmp_path / "hub" / "blobs", snapshot):
        folder.mkdir(parents=True)
    for name in ("store.jpg", "a.jpg", "hash"):
        (tmp_path / "store" / name).write_bytes(encoded("JPEG"))
    (tmp_path / "hub" / "blobs" / "0123").write_bytes(encoded("JPEG"))
    (snapshot / "blob.jpg").symlink_to("../../../blobs/0123")
    (snapshot / "store.jpg").symlink_to(tmp_path / "store" / "store.jpg")
    (snapshot / "chain.jpg").symlink_to("store.jpg")
    (snapshot / "sub").symlink_to(tmp_path / "store")
    for link in place.iterdir():
        link.unlink() if link.is_symlink() else None
    place.rename(corpus / "tweets" / "unused")
    hostile.write_names(corpus, names)
    place.symlink_to(snapshot)
    tools.check.check(corpus, require_images=True)
    features = hostile.features(corpus, "error")
    assert len({features(record)[0].numpy().tobytes()
                for record in hostile.load_corpus(corpus, "train")}) == 1
    before = split_digest(corpus, "train")
    (tmp_path / "store" / "new.jpg").write_bytes(b"")
    assert split_digest(corpus, "train") != before  # scores of a corpus know of its pictures


# ------------------------------------------------------------------------------ nobody may write

@contextmanager
def unwritable(root: Path, number: int) -> Iterator[None]:
    """Everything below a folder answers as a mount that is read-only (EROFS), or as files of
    somebody else (EACCES), which root is never told."""
    def guard(call: Callable, writes: Callable[..., bool]) -> Callable:
        def guarded(path: object, *args: object, **options: object) -> object:
            if (isinstance(path, (str, os.PathLike)) and writes(*args, **options)
                    and Path(os.path.realpath(path)).is_relative_to(root.resolve())):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return call(path, *args, **options)
        return guarded

    def opens(flags: int, *_: object, **__: object) -> bool:
        return flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0

    def mode(word: str = "r", *_: object, **__: object) -> bool:
        return not set(word).isdisjoint("wax+")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", guard(os.open, opens))
        patch.setattr("builtins.open", guard(open, mode))
        patch.setattr(io, "open", guard(io.open, mode))
        patch.setattr(os, "mkdir", guard(os.mkdir, lambda *_, **__: True))
        yield


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Callable[[], str]:
    """What was noted since the last call; each note is printed once in a process."""
    files.note.cache_clear()
    return lambda: capsys.readouterr().err


@pytest.fixture
def tweets(tmp_path: Path) -> Path:
    return corpus_with(tmp_path, encoded("JPEG"), objects=[[1, 2, 30, 20]])


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_features_of_a_corpus_that_may_not_be_written_to_are_read_there(
        number: int, tweets: Path, tmp_path: Path, said: Callable,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keeper has computed them: no lock, no note, no second copy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    hostile.features(tweets, "error")
    assert len(listing(tweets / ".features")) == 1
    with unwritable(tweets, number):
        hostile.features(tweets, "error")
    assert said() == "" and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_new_features_of_such_a_corpus_go_to_the_users_cache(
        number: int, tweets: Path, tmp_path: Path, said: Callable,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The note says where and why; another start computes nothing."""
    home = tmp_path / "mine" / "clorae" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    with unwritable(tweets, number):
        hostile.features(tweets, "error")
        assert said() == (f"note: image features are kept in {home}, not in {tweets / '.features'} "
                          f"({os.strerror(number)})\n")
        monkeypatch.setattr(FeatureCache, "store", None)
        hostile.features(tweets, "error")
    assert len(listing(home)) == 1 and not (tweets / ".features").exists()
    with unwritable(tmp_path, number):  # nothing can be written, nothing need be
        hostile.features(tweets, "error")


def test_where_nothing_can_be_written_each_place_is_named(
        tweets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a home; --cache DIR helps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    with unwritable(tmp_path, errno.EROFS):
        assert hostile.complaint(lambda: hostile.features(tweets, "error"), UsageError) == (
            "image features: expected a folder that can be written to, got "
            f"{tweets / '.features'} (Read-only file system), {tmp_path}/mine/clorae/features "
            "(Read-only file system); name another one with --cache DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    with unwritable(tweets, errno.EROFS):
        hostile.features(tweets, "error")
    assert len(listing(tmp_path / "me" / ".cache" / "clorae" / "features")) == 1


def test_cache_names_the_folder_for_new_features(small: dict[str, str], tmp_path: Path) -> None:
    """Of train.py and of evaluate.py; what lies beside the corpus is read all the same."""
    world = tmp_path / "world"
    shutil.copytree(small["data"], world, ignore=shutil.ignore_patterns(".feat*"))
    folders = ["--data", world, "--t5", small["t5"], "--vit", small["vit"]]
    train.main([*map(str, folders), "--steps", "1", "--epochs", "1", "--rank", "6",
                "--units", "MED", "--max-target", "4", "--out", str(tmp_path / "run"), "--cache",
                str(tmp_path / "cache")])
    assert listing(tmp_path / "cache") and not (world / ".features").exists()
    hostile.evaluate.main([str(tmp_path / "run"), "--split", "dev", "--units", "MED",
                           "--cache", str(tmp_path / "other")])
    assert listing(tmp_path / "other") and not (world / ".features").exists()
    assert "cache" not in vars(Config()) and parse_arguments(["--cache", "x"])[1].cache == "x"


# ------------------------------------------------------------------------------ no locks

@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EBADF", "EOPNOTSUPP"])
def test_without_locks_one_note_says_what_is_lost(
        name: str, tweets: Path, tmp_path: Path, said: Callable,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folder, features, the folder of weights: each goes on; of a node one process says it."""
    number = getattr(errno, name)

    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        claim(tmp_path / "run").close()
    assert said() == (f"note: {tmp_path}/run/.lock: expected a file system with locks, got "
                      f"{os.strerror(number)}; a second run that writes to this --out would go "
                      "unnoticed: start one at a time\n")
    hostile.features(tweets, "error")
    assert "processes may compute the same features" in said() and listing(tweets / ".features")
    monkeypatch.setenv("LOCAL_RANK", "1")
    locked(tmp_path / "weights" / ".lock", "a risk").close()
    assert said() == ""


def test_other_faults_of_a_lock_are_named_truly(tmp_path: Path, said: Callable,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held stays one, an input/output error too; a folder says its own reason."""
    with locked(tmp_path / "run" / ".lock", "a risk"):
        with pytest.raises(UsageError, match="that no other process writes to, got one in use"):
            claim(tmp_path / "run")
    with unwritable(tmp_path, errno.EROFS):
        with pytest.raises(UsageError, match="a writable folder, got Read-only file system"):
            claim(tmp_path / "new")
    for number in (errno.EROFS, errno.EACCES):
        code, text = verdict(OSError(number, os.strerror(number), "a/file"))
        assert code == 2 and text.startswith("error: a/file: expected a place that this user may ")

    def flock(file: object, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UsageError, match="a writable folder, got Input/output error"):
        claim(tmp_path / "run")
    assert said() == ""


def test_a_working_folder_that_may_not_be_written_to_is_enough(
        small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where corpus and models are given, nothing is made in weights/, and nothing is locked."""
    monkeypatch.chdir(tmp_path)
    with unwritable(tmp_path, errno.EROFS):
        train.prepare(Config(**small))
        with pytest.raises(OSError, match="Read-only file system: 'weights'"):
            train.prepare(Config(**small | {"vit": None}))


def test_another_users_lock_in_a_shared_folder_is_respected(tmp_path: Path) -> None:
    """A world-writable folder whose lock is its maker's: taken for reading, it excludes as well."""
    mine = locked(tmp_path / ".lock", "a risk")
    with unwritable(tmp_path, errno.EACCES):
        with pytest.raises(BlockingIOError):
            locked(tmp_path / ".lock", "a risk", wait=False)
        mine.close()
        locked(tmp_path / ".lock", "a risk", wait=False).close()
