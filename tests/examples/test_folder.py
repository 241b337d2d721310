"""Which files of a folder are read, what their pixels are, and that nothing is left out without a word."""

from __future__ import annotations

import io
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps

from tests.examples import odd_files
from tests.examples.odd_files import KINDS, STORED
from tests.examples.running import failed, metrics, run, write_faces

from faces.files import printable  # isort: skip  # running puts it on the path
from faces.folder import NAMED, load_folder, shortened  # isort: skip
from faces.pictures import read_face  # isort: skip

LOCKED = "locked"  # a name without permission


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_looks_as_it_was_made(tmp_path, name):
    """In every orientation that the file can tell."""
    kind = KINDS[name]
    for orientation in STORED if kind.oriented else [1]:
        file = tmp_path / f"{orientation}{kind.suffix}"
        shown = odd_files.write(file, kind, seed=orientation, orientation=orientation)
        with odd_files.Image.open(file) as image:
            # else the case is another one than its name says; Pillow 10.1 opens PNG's 16 bits in 32
            assert image.mode == kind.mode or (name, image.mode) == ("png 16 bits", "I")
        assert _apart(read_face(file), shown) <= kind.apart, orientation


def test_deep_and_shallow_files_of_one_picture_are_the_same_pixels(tmp_path):
    pixels = odd_files.colours(1)[..., 0].copy()
    pixels[0, 0] = 255
    files = {"8 bits.png": pixels, "16.png": pixels.astype(np.uint16) * 257, "16.pgm": pixels.astype(np.int32) * 257}
    files |= {"float.tif": (pixels / 255).astype(np.float32), "wide float.tif": pixels.astype(np.float32)}
    for name, values in files.items():
        odd_files.Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_face(tmp_path / name), pixels), name


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    """Its white is 65 535 by its format, whatever its brightest pixel is."""
    for name, dtype in (("dark.png", np.uint16), ("dark.pgm", np.int32)):
        odd_files.Image.fromarray(np.full((56, 46), 200, dtype)).save(tmp_path / name)
        assert read_face(tmp_path / name).max() == 1


def test_numbers_that_are_none_do_not_reach_the_pixels(tmp_path):
    values = np.linspace(0, 1, 56 * 46, dtype=np.float32).reshape(56, 46)
    values[0, :3] = np.nan, np.inf, -np.inf
    odd_files.Image.fromarray(values).save(tmp_path / "a.tif")
    face = read_face(tmp_path / "a.tif")
    assert face[0, :3].max() == 0 and face.max() == 255


# What may lie in the folder of an identity, apart from images
ODD = ("text", "empty", "fifo", "socket", "dangling link", "link to itself", "folder", "broken image", "no permission")
PEOPLE = ("folder", "hidden", "empty", "no permission", "link to another", "link around", "file", "dangling link")
NAMES = ("face", "portrait [edited]", "a b", "[bold]", ":smile:", "two\nlines", "\x1b[31m", "é", "e\u0301", "顔", "'\"")
RAW = () if sys.platform == "darwin" else (b"caf\xe9", b"\xff\xfe", b"cut \xe9\xa1")  # no UTF-8


def _name(number: int, choice: int) -> str:
    names = (*NAMES, *map(os.fsdecode, RAW))
    return f"{names[choice % len(names)]}{number}"


contents = st.lists(
    st.tuples(st.sampled_from((*KINDS, *ODD, "hidden image", "link to an image")), st.integers(0, 2**16)), max_size=5
)
trees = st.lists(st.tuples(st.sampled_from(PEOPLE[:1] * 4 + PEOPLE[1:]), st.integers(0, 99), contents), max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(trees)
def test_every_file_is_read_as_it_looks_or_named(tree):
    with tempfile.TemporaryDirectory() as name, _sockets(), _permissions():
        root = Path(name) / "data"
        shown, named = _grow(root, tree)
        try:
            faces, left_out = load_folder(root)
        except ValueError as error:  # DataError
            assert not shown and str(error).count("\n") == 0
            return
        assert len(faces.images) == len(shown)
        people = list(dict.fromkeys(file.parent for file in sorted(shown)))
        for row, file in enumerate(sorted(shown)):
            seen, apart = shown[file]
            assert _apart(faces.images[row].numpy(), seen) <= apart, file
            assert people[faces.labels[row]] == file.parent
        assert sorted(line.rsplit(" (", 1)[0] for line in left_out) == sorted(map(printable, named))
        assert all(line.isprintable() for line in left_out)


def _grow(root: Path, tree: list) -> tuple[dict[Path, tuple[np.ndarray, float]], list[Path]]:
    """Makes the tree. Returns what each image shows with its tolerance, and the names of everything else."""
    root.mkdir()
    shown: dict[Path, tuple[np.ndarray, float]] = {}
    named: list[Path] = []
    for number, (what, choice, inside) in enumerate(tree):
        person = root / _name(number, choice)
        if what == "folder" and inside:
            person.mkdir()
            for at, (kind, seed) in enumerate(inside):
                _put(person, at, kind, seed, shown, named, root)
            continue
        if what == "hidden":
            person = root / f".{person.name}"
        elif what == "no permission":
            person = root / f"{LOCKED}{number}"
        named.append(person.relative_to(root))
        if what in ("hidden", "no permission"):
            person.mkdir()
            odd_files.write(person / "face.png", KINDS["png L"], 1)
        elif what in ("empty", "folder"):
            person.mkdir()
        elif what == "link around":
            person.symlink_to("." if choice % 2 else "..")
        elif what == "link to another":
            first = next((path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink()), None)
            person.symlink_to(first.name if first and not first.name.startswith((".", LOCKED)) else "nowhere")
        elif what == "file":
            odd_files.write(person, KINDS["png without a suffix"], 1)
        else:
            person.symlink_to("nowhere")
    return shown, named


def _put(person: Path, at: int, kind: str, seed: int, shown: dict, named: list[Path], root: Path) -> None:
    path = person / (_name(at, seed) + (KINDS[kind].suffix if kind in KINDS else ".png"))
    if kind in KINDS:
        orientation = seed % 8 + 1 if KINDS[kind].oriented else 1
        shown[path] = odd_files.write(path, KINDS[kind], seed, orientation), KINDS[kind].apart
        return
    if kind == "link to an image":
        aim = root.parent / f"{at}{seed}.png"
        shown[path] = odd_files.write(aim, KINDS["png L"], seed), 1
        path.symlink_to(aim)
        return
    if kind == "hidden image":
        path = person / f".{path.name}"
    elif kind == "no permission":
        path = person / f"{LOCKED}{at}.png"
    named.append(path.relative_to(root))
    if kind in ("hidden image", "no permission"):
        odd_files.write(path, KINDS["png L"], seed)
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        _listen(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
        odd_files.write(path / "face.png", KINDS["png L"], seed)
    else:
        odd_files.write(path, KINDS["png RGB"], seed)
        path.write_bytes(path.read_bytes()[: 200 + seed % 200])


open_sockets: list[socket.socket] = []


def _listen(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for a socket
    server.bind(os.fsencode(path.name))
    os.chdir(here)
    open_sockets.append(server)


@contextmanager
def _sockets() -> Iterator[None]:
    yield
    while open_sockets:
        open_sockets.pop().close()


@contextmanager
def _permissions() -> Iterator[None]:
    """Names that begin with LOCKED cannot be read. (Root may read everything, so that chmod is not enough.)"""
    opened, listed = open, pathlib.Path.iterdir

    def refuse(path: object) -> None:
        if isinstance(path, (str, Path)) and Path(path).name.startswith(LOCKED):
            raise PermissionError(13, "Permission denied", str(path))

    def guarded_open(path, mode="r", *rest, **options):
        if "r" in mode:
            refuse(path)
        return opened(path, mode, *rest, **options)

    def guarded_list(self):
        refuse(self)
        return listed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", guarded_open)
        patch.setattr(pathlib.Path, "iterdir", guarded_list)
        yield


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**32))
def test_a_spoilt_file_is_read_or_named(kind, seed):
    """Never both, never neither, never an exception; and where the colours are plain, it is read as Pillow shows it."""
    with tempfile.TemporaryDirectory() as name:
        person = Path(name) / "somebody"
        person.mkdir()
        odd_files.write(person / "good.png", KINDS["png L"], 1)
        spoilt = person / f"spoilt{KINDS[kind].suffix}"
        odd_files.write(spoilt, KINDS[kind], 1)
        odd_files.spoil(spoilt, seed)
        faces, left_out = load_folder(Path(name))
        assert len(faces.images) + len(left_out) == 2
        assert all(line.startswith("somebody/spoilt") and line.isprintable() for line in left_out)
        if not left_out:
            shown = _shown_by_pillow(spoilt.read_bytes())
            assert shown is None or np.array_equal(faces.images[1], shown)


def _shown_by_pillow(content: bytes) -> np.ndarray | None:
    with odd_files.Image.open(io.BytesIO(content)) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "RGB", "CMYK") or "transparency" in image.info:
        return None
    return np.asarray(ImageOps.fit(image.convert("L"), (46, 56), odd_files.Image.Resampling.BOX))


def test_a_folder_linked_twice_is_one_identity(tmp_path):
    write_faces(tmp_path, 3)
    (tmp_path / "a copy").symlink_to("person0")
    (tmp_path / "self").symlink_to(".")
    faces, left_out = load_folder(tmp_path)
    assert faces.labels.unique().tolist() == [0, 1, 2]
    assert left_out == ["a copy (the same folder as person0)", "self (a link to a folder around it)"]


def test_what_is_left_out_is_counted_printed_and_recorded(tmp_path):
    write_faces(tmp_path / "data", 8)
    (tmp_path / "data" / ".ipynb_checkpoints").mkdir()
    for number in range(NAMED + 5):
        (tmp_path / "data" / "person1" / f"portrait [edited] {number:02}.jpg").write_text("no image")
    result = run("--data", tmp_path / "data", "--out", tmp_path / "out", "--epochs", 1, "--embedding-size", 4)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "left out" in line)
    assert f"Files and folders left out: {NAMED + 6}, " in line and line.endswith("and 6 more")
    assert ".ipynb_checkpoints (hidden)" in line and "person1/portrait [edited] 00.jpg (not an image" in line
    recorded = metrics(tmp_path / "out")["data"]["left_out"]
    assert len(recorded) == NAMED + 6 and "portrait [edited] 24.jpg" in recorded[-1]


def test_few_are_all_named():
    assert shortened(["a (x)", "b (y)"]) == "a (x); b (y)"


@pytest.mark.parametrize("depth", ["no image", "one level too deep", "a file", "missing"])
def test_no_face_at_all_is_one_line(tmp_path, depth):
    data = tmp_path / "data"
    if depth == "a file":
        data.touch()
    elif depth == "one level too deep":
        write_faces(data / "train", 2)
    elif depth == "no image":
        (data / "somebody").mkdir(parents=True)
        (data / "somebody" / "notes.txt").touch()
    result = run("--data", data, "--out", tmp_path / "out")
    named = {"no image": "somebody/notes.txt", "one level too deep": "train/person0", "a file": "Not a directory"}
    failed(result, 2, "error: --data: expected", named.get(depth, "No such file"))
    assert result.output.count("\n") <= 2  # the progress bar and the error
    assert not (tmp_path / "out").exists()


def _apart(face: np.ndarray, shown: np.ndarray) -> float:
    return float(np.abs(face.astype(np.float64) - shown).mean())
