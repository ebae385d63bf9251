"""What people bring: folders, pictures, words, files made by hand. Nothing is taken for something else."""
import io
import os
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LATENT, Run, popen, refusal
from PIL import Image, ImageOps

import sample
import train

COLOURS = dict(cat=(200, 0, 0), dog=(0, 0, 200))

def picture(path, colour=(200, 0, 0), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path, **options)

@pytest.fixture
def pets(tmp_path):
    """A folder of two classes with two pictures each."""
    for name in COLOURS:
        for i in range(2):
            picture(tmp_path / "pets" / name / f"{i}.png", COLOURS[name])
    return tmp_path / "pets"

def source_of(data, size=8):
    return train.open_source(train.Config(data=str(data), image_size=size, out="runs/x", cache="runs/cache"))

def read(path, size=8):
    """The pixels of the only picture in a folder, or the UserError's words."""
    try:
        return source_of(path, size).load(0)
    except sample.UserError as error:
        return str(error)


# Folders --------------------------------------------------------------------------------------------------------------

def test_only_the_pictures_of_classes_are_read_and_the_rest_is_said(pets):
    clean = source_of(pets)
    for hidden in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "dog/@eaDir/0.png", "__MACOSX/cat", ".cache/a"):
        picture(pets / hidden / "0.png")
    for name in ("cat/._0.png", "dog/.DS_Store"):
        (pets / name).write_bytes(b"Mac")
    assert source_of(pets)[:4] == clean[:4] and source_of(pets).note == ""
    assert clean.class_names == ["cat", "dog"] and clean.labels == [0, 0, 1, 1] and clean.note == ""
    for name in ("loose.png", "more.jpg"):
        picture(pets / name)
    (pets / "cat" / "notes.txt").write_text("three cats")
    (pets / "cat" / "clip.mpg").write_bytes(b"\0\0\1\xb3" + bytes(99))          # Pillow knows it, but does not draw it
    (pets / "cat" / "labels.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    (pets / "cat" / "sizes.bin").write_bytes(np.array([0, 2, 3], np.uint16).tobytes() + bytes(99))      # TGA, or not
    (pets / "cat" / "gone.png").symlink_to("/no/such/file.png")
    (pets / "cat" / "round.png").symlink_to("round.png")
    (pets / "aardvark").symlink_to("dog")
    (pets / "owl").mkdir()
    os.mkfifo(pets / "dog" / "pipe")                                              # to open it would wait for ever
    dirty = source_of(pets)
    assert dirty[:4] == clean[:4]
    assert sorted(dirty.note.removeprefix(f"left out of {pets}: ").split("; ")) == [
        "files that Pillow does not read: 5, such as cat/clip.mpg", "folders without pictures: 1, such as owl",
        "links that lead nowhere: 2, such as cat/gone.png",
        "links to folders that are read anyway: 1, such as aardvark",
        "pictures beside the class folders: 2, such as loose.png"]

def test_what_is_left_out_and_the_first_classes_are_said_at_the_start(run, pets):
    (pets / "cat" / "notes.txt").write_text("three cats")
    said = run("--steps 1 --data", pets).text
    assert "4 images, 2 classes (cat, dog)" in said
    assert f"left out of {pets}: files that Pillow does not read: 1, such as cat/notes.txt" in said

@pytest.mark.parametrize("target", ["..", "../..", ".", "../dog", "../../other/../pets/dog"])
def test_a_folder_is_read_once_and_under_its_own_name(target, pets, tmp_path):
    picture(tmp_path / "other" / "0.png")
    (pets / "cat" / "back").symlink_to(target)
    assert source_of(pets).labels == [0, 0, 1, 1] and "links to folders that are read anyway: 1" in source_of(pets).note

def test_classes_may_be_links(pets, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "tiger").symlink_to(pets / "cat")
    assert source_of(tmp_path / "some").class_names == ["tiger"] and source_of(tmp_path / "some").labels == [0, 0]

def test_a_run_and_its_cache_may_lie_in_the_data(run, pets, monkeypatch):
    """Two runs that draw pictures, started in the folder of the data, and the first one resumed."""
    monkeypatch.chdir(pets)
    for out in ("stopped", "first", "second"):
        run("--data . --steps 2 --sample-every 2 --cache runs/cache --out", f"runs/{out}")
        assert torch.load(f"runs/{out}/ckpt.pt")["class_names"] == ["cat", "dog"]
        (pets / "runs" / "stopped" / "ckpt.pt").unlink(missing_ok=True)           # killed before its first checkpoint
    sample.main("runs/first --num-samples 3 --cfg-scale 1 --steps 1 --device cpu --out a-set".split())
    train.main("--resume runs/first --steps 3 --device cpu".split())
    assert torch.load("runs/first/ckpt.pt")["step"] == 3
    (pets / "cat" / "ckpt.pt").touch()                                            # is only a file
    assert source_of(pets).class_names == ["cat", "dog"]

FORMATS = dict(gif="GIF", jfif="JPEG", jpe="JPEG", jp2="JPEG2000", avif="AVIF", webp="WEBP", tif="TIFF", bmp="BMP",
               ico="ICO", JPG="JPEG", data="PNG", noextension="PNG")

@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_of_pillow_is_read(extension, tmp_path):
    name = "1" if extension == "noextension" else f"1.{extension}"
    picture(tmp_path / "cat" / name, format=FORMATS[extension])
    pixels = read(tmp_path)
    assert pixels.shape == (8, 8, 3) and np.abs(pixels - np.array(COLOURS["cat"])).max() < 5

def test_splits_are_no_classes(pets, tmp_path):
    for split, n in (("test", 1), ("train", 2), ("val", 1)):
        for i in range(n):
            shutil.copytree(pets, tmp_path / "pets-root" / split / str(i))
    picture(tmp_path / "pets-root" / "train" / "loose.png")
    assert f"--data {tmp_path}/pets-root/train" in read(tmp_path / "pets-root")
    assert source_of(tmp_path / "pets-root" / "val").class_names == ["0"]
    assert "all pictures lie deeper" in source_of(tmp_path / "pets-root" / "val").note
    for name in ("train", "bus"):                                                 # with pictures of its own it is one
        picture(tmp_path / "vehicles" / name / "0.png")
    assert source_of(tmp_path / "vehicles").class_names == ["bus", "train"]

@pytest.mark.parametrize("make,words", [
    (lambda data: picture(data / "0.png"), "pictures beside the class folders: 1"),
    (lambda data: (data / "cat").symlink_to("/no/cat"), "links that lead nowhere: 1, such as cat"),
    (lambda data: (data.rmdir(), data.symlink_to("/no/pets")), "a link to /no/pets"),
    (lambda data: (data / "cat").mkdir(), "folders without pictures: 1, such as cat"), (lambda data: None, "is empty"),
    (lambda data: data.rmdir(), "No such file")])
def test_a_folder_without_classes_is_refused_with_its_reason(make, words, tmp_path):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    assert words in read(tmp_path / "data")

@pytest.mark.parametrize("call,name", [("scandir", "dog"), ("stat", "0.png")])
def test_a_folder_that_one_may_not_read_or_enter_is_not_skipped(call, name, pets, monkeypatch):
    original = getattr(os, call)

    def forbidden(path, *args, **kwargs):
        if str(path).endswith(f"dog/{name}") or Path(path).name == name == "dog":
            raise PermissionError(13, "Permission denied", path)
        return original(path, *args, **kwargs)
    monkeypatch.setattr(os, call, forbidden)
    assert "Permission denied" in read(pets)

def test_data_is_not_the_folder_of_the_run(pets):
    for flag in ("--out", "--cache"):
        assert f"--data {pets} is also --out or --cache" in refusal(train.main, "--data", pets, flag, pets, folder=pets)

def test_names_are_compared_in_one_spelling_of_unicode(tmp_path):
    """A Mac spells the accent of café as a letter of its own. A folder from a Mac is the same folder."""
    for spelling in ("NFC", "NFD"):
        picture(tmp_path / spelling / unicodedata.normalize(spelling, "café") / "0.png")
        picture(tmp_path / spelling / "the" / "0.png")
    composed, mac = source_of(tmp_path / "NFC"), source_of(tmp_path / "NFD")
    assert composed.class_names == mac.class_names and composed.identity == mac.identity
    for spelling in ("NFC", "NFD"):
        assert sample.parse_classes(unicodedata.normalize(spelling, "café"), mac.class_names) == [0]
        assert sample.parse_classes("café", [unicodedata.normalize(spelling, name) for name in ("café", "the")]) == [0]
    picture(tmp_path / "NFC" / unicodedata.normalize("NFD", "café") / "1.png")
    assert "two spellings" in read(tmp_path / "NFC")


# Pictures -------------------------------------------------------------------------------------------------------------

def exif(*entries):
    """EXIF with these (tag, type, count, value)."""
    table, data, end = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            value, data = struct.pack("<I", end + len(data)), data + value
        table += struct.pack("<HHI4s", tag, kind, count, value)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + b"\0\0\0\0" + data

def photo(path, *entries, size=(40, 24)):
    """A picture whose left and upper parts differ, stored with EXIF."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :size[0] // 2, 0], pixels[:size[1] // 2, :, 1] = 250, 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=98, exif=exif(*entries))
    return path

def orientation(number):
    return 0x0112, 3, 1, struct.pack("<H", number)

@pytest.mark.parametrize("number", range(10))
def test_a_photo_is_turned_upright(number, tmp_path):
    path = photo(tmp_path / "a" / "0.jpg", orientation(number))
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(read(tmp_path), train.center_crop(upright, 8))

ODD = {AttributeError: (271, 12, 1, struct.pack("<d", 1.5)), TypeError: (282, 2, 4, b"abc\0"),
       struct.error: (256, 9, 1, struct.pack("<i", -5))}                          # what Pillow's exif_transpose raises

@pytest.mark.parametrize("error", ODD)
def test_odd_exif_entries_do_not_stop_a_rotated_photo(error, tmp_path):
    good, odd = (photo(tmp_path / name / "a" / "0.jpg", orientation(6), *more)
                 for name, more in (("good", []), ("odd", [ODD[error]])))
    with pytest.raises(error):
        ImageOps.exif_transpose(Image.open(odd))
    assert np.array_equal(read(tmp_path / "odd"), read(tmp_path / "good"))

@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize("entry", [(0x0112, 1, 1, b"\6"), (0x0112, 3, 2, struct.pack("<HH", 6, 6)),
                                   (0x0112, 5, 1, struct.pack("<II", 6, 1)), (0x0112, 2, 2, b"6\0")])
def test_an_orientation_of_another_type_is_still_a_number(entry, tmp_path):
    photo(tmp_path / "good" / "a" / "0.jpg", orientation(6))
    photo(tmp_path / "odd" / "a" / "0.jpg", entry)
    assert np.array_equal(read(tmp_path / "odd"), read(tmp_path / "good"))

def see_through(mode, alpha):
    """A black picture with this alpha, in one of Pillow's ways."""
    image = Image.new("RGBA", (20, 20), (0, 0, 0, alpha))
    if mode == "P":
        image = Image.new("P", (20, 20))
        image.info["transparency"] = bytes([alpha])
    return image if mode == "P" else image.convert(mode)

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("alpha,grey", [(0, 255), (255, 0), (51, 204)])
def test_transparent_pictures_lie_on_white(mode, alpha, grey, tmp_path):
    (tmp_path / "a").mkdir()
    image = see_through(mode, alpha)
    image.save(tmp_path / "a" / "0.png", **({"transparency": bytes([alpha])} if mode == "P" else {}))
    assert np.abs(read(tmp_path).astype(int) - grey).max() <= 1

@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1)])
def test_a_very_long_picture_takes_little_memory(shape, tmp_path, monkeypatch):
    """It is cut before it is enlarged: 64 x 3,840,000 pixels would take 737 MB."""
    pixels, sizes, resize = np.zeros((*shape, 3), np.uint8), [], Image.Image.resize
    pixels[30000 - 20:30000 + 20], pixels[:, 30000 - 20:30000 + 20] = 200, 200
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    monkeypatch.setattr(Image.Image, "resize", lambda *args: sizes.append(args[1]) or resize(*args))
    assert (read(tmp_path, 64) == 200).all() and max(width * height for width, height in sizes) <= 16 * 64 * 64

def test_pictures_of_usual_shapes_are_cropped_as_adm_crops_them():
    """ADM's rule on the whole picture, up to 16 times as long as wide."""
    pixels = np.random.default_rng(0).integers(256, size=(20, 320, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = image.resize((160, 10), Image.Resampling.BOX).resize((128, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(train.center_crop(image, 8), np.asarray(whole)[:, 60:68])

@pytest.mark.parametrize("error", [RuntimeError("avif"), TypeError(), struct.error("4"), MemoryError(), KeyError(3)])
@pytest.mark.parametrize("flags", ["", f"{LATENT} VAE"])
def test_all_broken_pictures_are_told_at_once(error, flags, run, pets, vae_folder, monkeypatch):
    """Whatever their decoders raise. Nothing is prepared, and no run begins."""
    for i in range(12):
        picture(pets / "owl" / f"{i:02d}.png", (7, 7, 7))
    crop = train.center_crop

    def decode(image, size):
        if image.load()[0, 0] == (7, 7, 7):
            raise error
        return crop(image, size)
    monkeypatch.setattr(train, "center_crop", decode)
    said = run(flags.replace("VAE", str(vae_folder)), "--data", pets, status=2).text
    assert "12 of 16 pictures" in said and said.count("\n") == 1 and not list(run.folder.rglob("*.npy"))
    assert all(f"owl/{i:02d}.png" in said for i in range(10)) and "owl/10.png" not in said
    assert not (run.folder / "run1").exists()

MODES = dict.fromkeys("JPEG WEBP BMP TIFF PPM TGA AVIF JPEG2000 DDS SGI MPO QOI IM DIB".split(), "RGB") | {
    "PNG": "RGBA", "ICO": "RGBA", "ICNS": "RGBA", "GIF": "P", "BLP": "P", "PCX": "L", "XBM": "1", "MSP": "1",
    "SPIDER": "F"}

def small_pictures():
    """One in each of Pillow's formats, and in TIFF's compressions, as bytes."""
    pixels = Image.fromarray(np.random.default_rng(1).integers(256, size=(16, 16, 3), dtype=np.uint8))
    turned, files = exif(orientation(6)), []
    options = [(name, {"exif": turned} if name in ("JPEG", "PNG", "WEBP", "AVIF") else {}) for name in MODES]
    options += [("TIFF", {"compression": how}) for how in ("tiff_lzw", "jpeg", "packbits", "tiff_deflate")]
    for name, more in options:
        pixels.convert(MODES[name]).save(file := io.BytesIO(), name, **more)
        files.append(file.getvalue())
    return files

def damaged(content, rng):
    """The content with bytes changed, cut out or repeated, or without its end."""
    for _ in range(rng.integers(1, 4)):
        k = int(rng.integers(len(content) + 1) * rng.choice([0.1, 1]))            # headers are at the start
        end = k + int(rng.integers(1, 9))
        middle = [rng.bytes(end - k), b"", 4 * content[k:end]][rng.choice(3, p=[0.6, 0.2, 0.2])]
        content = content[:max(k, 8)] if rng.random() < 0.1 else content[:k] + middle + content[end:]
    return content

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_twelve_thousand_damaged_pictures_are_a_picture_or_one_line_each(tmp_path):
    path, rng, files, read_ones, lines = tmp_path / "a" / "0.png", np.random.default_rng(0), small_pictures(), 0, set()
    picture(path)
    source = source_of(tmp_path)
    for k in range(12_000):
        path.write_bytes(damaged(files[k % len(files)], rng))
        try:
            pixels = source.load(0)
        except sample.UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            lines.add(str(error))
        else:
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
            read_ones += 1
    print(f"\n{read_ones} pictures were read; {len(lines)} different lines")
    assert read_ones > 1000 and len(lines) > 100


# Words ----------------------------------------------------------------------------------------------------------------

NUMBERS = [f"{i:02d}" for i in range(1, 11)]

@pytest.mark.parametrize("names,word,label", [
    (NUMBERS, "01", 0), (NUMBERS, "10", 9), (NUMBERS, "0", 0), (NUMBERS, "1", None), (NUMBERS, "9", None),
    (NUMBERS, "1:02", 1), (NUMBERS, "0:01", 0), (NUMBERS, "1:01", "no class"), (NUMBERS, "11", "no class"),
    (["0", "1", "10", "2"], "1", 1), (["0", "1", "10", "2"], "2", None), (["0", "1", "10", "2"], "3:2", 3),
    (["001.Albatross", "002.Auk"], "1", None), (["1_cat", "2_dog"], "1", None), (["2d", "3d"], "1", 1),
    (["cat ", "dog"], "0:cat", 0), (["a", "b", "a"], "a", None), (["a", "b", "a"], "2", 2),
    (["ant", "9" * 5000], "9" * 5000, 1)])
def test_a_word_for_two_classes_is_refused_with_both_readings(names, word, label):
    """The folders 01..10 have the numbers 0..9."""
    if isinstance(label, int):
        assert sample.class_number(word, names) == label
    else:
        with pytest.raises(sample.UserError, match=label or " or ") as error:
            sample.class_number(word, names)
        assert label or sum(f"{i}:{name}" in str(error.value) for i, name in enumerate(names)) == 2

def test_the_labels_of_a_set_may_be_given_to_another(tiny_run, tmp_path):
    sets = f"{tiny_run.out} --num-samples 5 --cfg-scale 1 --steps 1 --device cpu --out {tmp_path}"
    sample.main(f"{sets}/a".split())
    sample.main(f"{sets}/b --seed 1 --labels {tmp_path}/a/labels.txt".split())
    assert (tmp_path / "a" / "labels.txt").read_text() == (tmp_path / "b" / "labels.txt").read_text()

@pytest.mark.parametrize("word", ["shapes", "cifar10"])
def test_a_built_in_set_beside_a_folder_of_its_name_is_refused_with_both_readings(word, run, pets, monkeypatch):
    monkeypatch.chdir(pets.rename(pets.with_name(word)).parent)
    said = refusal(train.main, "--data", word)
    assert f"the built-in {word} or the folder {word}" in said and f"./{word} for the folder" in said
    assert run(f"--steps 1 --data ./{word}").state["class_names"] == ["cat", "dog"]

def test_official_weights_beside_a_file_of_their_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("DiT-XL").mkdir()
    Path("DiT-XL/2-256").write_bytes(b"")
    assert "write ./DiT-XL/2-256" in refusal(sample.main, "DiT-XL/2-256 --device cpu")

@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_may_lack_the_letters_of_a_name(encoding, run, tmp_path):
    """Also for a folder from an old zip, whose name is no UTF-8."""
    for name in ("猫".encode(), b"caf\xe9"):
        os.makedirs(bytes(tmp_path / "pets") + b"/" + name)
        picture(tmp_path / "x.png")
        shutil.copy(bytes(tmp_path / "x.png"), bytes(tmp_path / "pets") + b"/" + name + b"/0.png")
    env, sets = dict(PYTHONIOENCODING=encoding, PYTHONUTF8="1"), "--steps 1 --device cpu --out"
    begun = run("--steps 1 --data", tmp_path / "pets", env=env)
    assert begun.state["class_names"] == ["caf\udce9", "猫"] and r"caf\udce9, \u732b" in begun.text
    for flags in (f"{sets} x.png", f"--num-samples 3 --cfg-scale 1 {sets} set"):
        command = [*run.command("sample"), str(begun.out), *flags.split()]
        Run(run.folder, popen(command, tmp_path, env)).wait()
    names = (tmp_path / "set" / "labels.txt").read_bytes().split(b"\n")[:3]
    assert set(names) <= {b"0\tcaf\xe9", "1\t猫".encode()}


# Files made by hand, and work that is not lost ------------------------------------------------------------------------

def test_a_checkpoint_that_one_may_not_read_is_not_called_damaged(tiny_run, monkeypatch):
    def forbidden(path, *args):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr("builtins.open", forbidden)
    said = refusal(sample.main, tiny_run.out, "--device cpu")
    assert "Permission denied" in said and "damaged" not in said

@pytest.mark.parametrize("change,words", [
    (lambda state: state["config"].pop("cfg_scale"), "config['cfg_scale']"),
    (lambda state: state["config"].pop("label_drop"), "config['label_drop']"),
    (lambda state: (state["config"].pop("vae"), state["config"].update(scale=1)), "config['vae']"),
    (lambda state: state["config"].update(cfg_scale="4"), "config['cfg_scale']"),
    (lambda state: state["class_names"].pop(), "a name for each class"),
    (lambda state: state["class_names"].__setitem__(0, 7), "a name for each class"),
    (lambda state: state["model_args"].update(hidden_size=-4), "an impossible model"),
    (lambda state: state["model_args"].pop("num_classes"), "a name for each class")])
def test_a_checkpoint_made_by_hand_is_told_what_it_lacks(change, words, tiny_run, tmp_path):
    state = tiny_run.state
    change(state)
    torch.save(state, tmp_path / "ckpt.pt")
    assert words in refusal(sample.main, tmp_path, "--device cpu", folder=tmp_path)

@pytest.mark.parametrize("change,words", [
    (lambda state: state["config"].pop("lr"), "lr"), (lambda state: state["config"].update(steps="8"), "steps"),
    (lambda state: state["config"].pop("data_digest"), "other images"),
    (lambda state: state["config"].update(batch_size=0), "at least 1"),
    (lambda state: state.update(step=-5), "-5 steps"), (lambda state: state["config"].update(dtype="fp8"), "dtype fp8"),
    (lambda state: state["opt"]["state"].clear(), "moments of AdamW"),
    (lambda state: state.update(opt={}), "not fit"), (lambda state: state.update(opt={"state": 3}), "not fit"),
    (lambda state: state["model"].pop("pos_embed"), "pos_embed"), (lambda state: state.update(ema={}), "not fit")])
def test_a_run_changed_by_hand_is_not_resumed(change, words, tiny_run, tmp_path):
    state = tiny_run.state
    change(state)
    torch.save(state, tmp_path / "ckpt.pt")
    assert words in refusal(train.main, "--resume", tmp_path, "--steps 9 --device cpu", folder=tmp_path)

@pytest.mark.parametrize("content", ["[]", "{", "3", ""])
def test_settings_of_a_set_that_are_no_settings_are_told(content, tiny_run, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "settings.json").write_text(content)
    flags = "--num-samples 2 --cfg-scale 1 --device cpu --out"
    assert "settings.json is damaged" in refusal(sample.main, tiny_run.out, flags, tmp_path, folder=tmp_path)

def test_the_batches_of_a_stopped_grid_are_kept(tiny_run, tmp_path, monkeypatch, capsys):
    draw, batches = sample.sample_images, iter(range(2))

    def stopped(*args, **kwargs):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)
    monkeypatch.setattr(sample, "sample_images", stopped)
    flags = f"{tiny_run.out} --steps 2 --batch-size 8 --device cpu --out {tmp_path}/x.png"
    for _ in range(2):                                                            # the second time it draws nothing
        with pytest.raises(KeyboardInterrupt):
            sample.main(flags.split())
        assert Image.open(tmp_path / "x.png").size == (8 * 68 + 4, 2 * 68 + 4)    # two of three rows
    assert "16 images, one row per class (ant, bee);" in capsys.readouterr().out

def test_a_picture_that_cannot_be_written_leaves_the_old_one(tiny_run, tmp_path, monkeypatch):
    """Nor is it lost if a GIF or a JPEG cannot be as large."""
    flags = f"{tiny_run.out} --steps 1 --classes 0 --device cpu --out {tmp_path}/x.jpg"
    sample.main(flags.split())
    before = (tmp_path / "x.jpg").read_bytes()
    with pytest.raises(sample.UserError, match="cannot write"):                   # at most 65,500 pixels wide
        sample.main(f"{flags} --per-class 1000 --batch-size 1000".split())
    assert (tmp_path / "x.jpg").read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def test_a_run_of_one_class_is_sampled_without_guidance(run, pets, monkeypatch):
    """It would cost twice for nothing: the class is everything."""
    shutil.rmtree(pets / "dog")
    scales, draw = [], sample.sample_images
    monkeypatch.setattr(sample, "sample_images", lambda *args, cfg_scale, **kwargs: scales.append(cfg_scale) or draw(
        *args, cfg_scale=cfg_scale, **kwargs))
    one = run("--steps 1 --sample-every 1 --data", pets)
    sample.main(f"{one.out} --steps 1 --device cpu --out {run.folder}/x.png".split())
    assert set(scales) == {1.0} and len(scales) > 1

def test_a_vae_that_gives_no_numbers_is_refused(run, vae_folder, monkeypatch):
    load = sample.load_vae

    def broken(*args):
        vae = load(*args)
        vae.quant_conv.bias.data[0] = torch.nan
        return vae
    monkeypatch.setattr(sample, "load_vae", broken)
    assert "not finite: use another --vae" in run(LATENT, vae_folder, status=2).text
    assert not list(run.folder.rglob("*.npy"))
