"""Labels from files: flat folders with a label file, lists, and ImageNet as it is downloaded."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from tests.helpers.tiny_data import list_examples
from vgg_jax import cli
from vgg_jax.data import open_split, open_train_val, split_names
from vgg_jax.data.label_file import read_rows
from vgg_jax.errors import InputError
from vgg_jax.evaluation.evaluate import load_evaluation

# ImageNet's numbers are not the order of the sorted synsets.
SYNSETS = {1: "n02119789", 2: "n02100735", 3: "n01440764"}


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(folder / name, "PNG")


def write_classes(root: Path, *classes: str) -> None:
    for name in classes:
        write_images(root / name, *(f"{i}.png" for i in range(5)))


def labels_by_name(source) -> dict[str, str]:
    return {
        Path(source.file_name(int(example["index"]))).name: source.classes[example["label"]]
        for example in list_examples(source)
    }


FLAT = {"b 1.jpg": "bees", "a.jpg": "ants", "c.jpg": "bees"}


@pytest.mark.parametrize(
    "name,content",
    [
        ("val.txt", "a.jpg ants\nb 1.jpg bees\nc.jpg bees\n"),
        ("val.txt", "\ufeffa.jpg 0\r\nb 1.jpg 1\r\nc.jpg 1\r\n\r\n"),
        ("val.csv", 'a.jpg,ants\n"b 1.jpg",bees\nc.jpg,bees\nelsewhere.jpg,ants\n'),
        ("val_labels.csv", "id,breed\na,ants\nb 1,bees\nc,bees\n"),
        ("labels.csv", "label;filename\nants;val/a.jpg\nbees;val/b 1.jpg\nbees;val/c.jpg\n"),
        ("labels.csv", "a.jpg, 0\nb 1.jpg, 1\n# a comment\nc.jpg, 1\n"),
        ("val/val_annotations.txt", "a.jpg\tants\t0\t0\nb 1.jpg\tbees\t0\t0\nc.jpg\tbees\t0\t0\n"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\na,ants 1 2\nb 1,bees 3\nc,bees 4 5\n"),
    ],
)
def test_flat_validation_split_with_label_file(tmp_path, caplog, name, content):
    write_classes(tmp_path / "train", "ants", "bees")
    write_images(tmp_path / "val", *FLAT)
    (tmp_path / name).write_text(content, "utf-8")
    with caplog.at_level("INFO", "vgg_jax"):
        train, validation = open_train_val(str(tmp_path))
    assert (train.size, validation.classes) == (10, ("ants", "bees"))
    assert labels_by_name(validation) == FLAT
    reading = "numbers count the sorted class names from 0" if "0\r" in content else "labels"
    assert f"labels of 3 photos are from {tmp_path / name}" in caplog.text
    assert reading in caplog.text


def test_flat_training_split_with_label_file(tmp_path):
    write_images(tmp_path / "train", *FLAT)
    write_images(tmp_path / "test", "x.jpg")
    (tmp_path / "labels.csv").write_text("id,breed\na,ants\nb 1,bees\nc,bees\n")
    train, validation = open_train_val(str(tmp_path))
    assert train.size + validation.size == 3
    assert labels_by_name(open_split(str(tmp_path), "train")) == FLAT


def test_storage_depends_on_labels_from_a_file(tmp_path):
    """A run must not resume with other labels. Names of files and classes are all equal here."""
    write_images(tmp_path / "train", *FLAT)
    storages = []
    for first, second in (("ants", "bees"), ("bees", "ants")):
        lines = f"train/a.jpg,{first}\ntrain/b 1.jpg,{second}\ntrain/c.jpg,bees\n"
        for name in ("train.csv", "list.csv"):
            (tmp_path / name).write_text(lines)
        for data in (tmp_path, tmp_path / "list.csv"):
            storages.append(open_split(str(data), "train").storage)
    assert len(set(storages)) == 4
    assert storages[0].startswith("folder, labels ") and storages[1].startswith("list, labels ")


def test_flat_splits_with_one_label_file(tmp_path):
    """The classes are those of the training split, also if the other split lacks one."""
    write_images(tmp_path / "train", *FLAT)
    write_images(tmp_path / "val", "x.jpg")
    (tmp_path / "labels.csv").write_text(
        "file,label\na.jpg,ants\nb 1.jpg,bees\nc.jpg,bees\nx.jpg,bees\n"
    )
    train, validation = open_train_val(str(tmp_path))
    assert train.classes == validation.classes == ("ants", "bees")
    assert labels_by_name(validation) == {"x.jpg": "bees"}


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("val.txt", "", "val.txt is empty"),
        ("val.txt", "a.jpg ants\nb 1.jpg bees\n", "1 of 3 photos have no label in .*'c.jpg'"),
        ("val.txt", "a.jpg 1\nb 1.jpg 2\nc.jpg 2\n", "the label '2': .* 2 training classes"),
        ("val.txt", "a.jpg ants\nb 1.jpg wasps\nc.jpg bees\n", "'b 1.jpg' the label 'wasps'"),
        ("val.csv", "a.jpg,ants\nb 1.jpg,\nc.jpg,bees\n", "line 2 of .* has no label"),
        ("val.csv", "a.jpg,ants\na.jpg,bees\n", "line 2 of .* gives 'a.jpg' a second label"),
        ("val.csv", "image,kind\na.jpg,ants\n", "columns 'image', 'kind': .* one for the label"),
        ("val.csv", b"a.jpg,\xe9t\xe9\n", "it is not UTF-8"),
        ("val.txt", "1\n2\n", "2 labels for 3 photos"),
        ("val.txt", "1\n2\n1\n", "an order of their own: .* meta.mat beside it"),
    ],
)
def test_wrong_label_file(tmp_path, name, content, message):
    write_classes(tmp_path / "train", "ants", "bees")
    write_images(tmp_path / "val", *FLAT)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_train_val(str(tmp_path))


def test_two_label_files(tmp_path):
    write_classes(tmp_path / "train", "ants", "bees")
    write_images(tmp_path / "val", *FLAT)
    for name in ("val.txt", "val.csv"):
        (tmp_path / name).write_text("a.jpg,ants\n")
    with pytest.raises(InputError, match="2 files may have the labels"):
        open_train_val(str(tmp_path))


def write_devkit(folder: Path, synsets: dict[int, str], numbers: list[int]) -> None:
    """Writes ImageNet's development kit, with the fields of its meta.mat."""
    folder.mkdir(parents=True, exist_ok=True)
    records = np.array(
        [(number, synset, "words") for number, synset in synsets.items()],
        [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O")],
    )
    savemat(folder / "meta.mat", {"synsets": records[:, None]})
    truth = "".join(f"{number}\n" for number in numbers)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def test_imagenet_as_downloaded(tmp_path):
    """The ground truth numbers the classes as meta.mat does, not in the order of the folders."""
    expected = write_imagenet(tmp_path)
    train, validation = open_train_val(str(tmp_path))
    assert train.classes == tuple(sorted(SYNSETS.values()))
    assert labels_by_name(validation) == expected


def write_imagenet(root: Path, count: int = 6) -> dict[str, str]:
    """Writes photos and the kit of ImageNet in miniature, and returns the synset of each photo."""
    write_classes(root / "train", *SYNSETS.values())
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, count + 1)]
    write_images(root / "val", *names)
    numbers = [3, 1, 2, 2, 3, 1][:count]
    write_devkit(root / "ILSVRC2012_devkit_t12" / "data", SYNSETS, numbers)
    return {name: SYNSETS[number] for name, number in zip(names, numbers, strict=True)}


@pytest.mark.slow
@pytest.mark.usefixtures("small_nets")
def test_imagenet_from_archives_to_posteriors(tmp_path, monkeypatch):
    """Each class has a colour. Only with the right labels are all photos classified."""
    monkeypatch.chdir(tmp_path)
    expected = write_imagenet(Path("ImageNet"))
    train = Path("ImageNet", "train")
    colours = dict(zip(SYNSETS.values(), ("red", "lime", "blue"), strict=True))
    for synset, colour in colours.items():
        for path in (train / synset).iterdir():
            Image.new("RGB", (20, 18), colour).save(path)
        archive = shutil.make_archive(str(train / synset), "tar", train / synset)
        shutil.rmtree(train / synset)
        shutil.unpack_archive(archive, train / synset, filter="data")
    for name, synset in expected.items():
        Image.new("RGB", (18, 20), colours[synset]).save(Path("ImageNet", "val", name))
    settings = "--net shallow --fc 24 16 --batch-norm --dropout-rate 0 --colour-shift 0"
    sizes = "--image-size 16 --scale 18 --batch-size 6 --epochs 8 --learning-rate 0.02"
    command = ["train", "ImageNet", *settings.split(), *sizes.split(), "--workdir", "run"]
    assert cli.main([*command, "--no-compilation-cache"]) == 0
    assert cli.main(["evaluate", "run", "--protocol", "center", "--out", "out"]) == 0
    evaluation = load_evaluation("out/posteriors.npz")
    assert evaluation.classes.tolist() == sorted(SYNSETS.values())
    for indices in (evaluation.labels, evaluation.posteriors.argmax(1)):
        synsets = evaluation.classes[indices]
        names = [Path(file).name for file in evaluation.files]
        assert dict(zip(names, synsets, strict=True)) == expected


def test_imagenet_without_some_photos(tmp_path):
    """A photo that is lost or empty does not move the labels of the others."""
    expected = write_imagenet(tmp_path)
    lost, empty, *_ = expected
    (tmp_path / "val" / lost).unlink()
    (tmp_path / "val" / empty).write_bytes(b"")
    with pytest.raises(InputError, match=f"1 of 5 files .* are not images.*{empty}"):
        open_split(str(tmp_path), "val")
    del expected[lost], expected[empty]
    assert labels_by_name(open_split(str(tmp_path), "val", skip_bad=True)) == expected


def test_imagenet_with_synsets_in_names(tmp_path):
    expected = write_imagenet(tmp_path)
    for name, synset in expected.items():
        path = tmp_path / "val" / name
        path.rename(path.with_name(f"{path.stem}_{synset}.png"))
    validation = open_split(str(tmp_path), "val")
    labels = labels_by_name(validation)
    assert len(labels) == 6 and all(label in name for name, label in labels.items())


@pytest.mark.parametrize("name", ["copy.JPEG", "ILSVRC2012_val_00000007.JPEG"])
def test_imagenet_with_another_photo(tmp_path, name):
    expected = write_imagenet(tmp_path)
    (tmp_path / "val" / min(expected)).rename(tmp_path / "val" / name)
    message = f"no label for '{name}': expected a name from ILSVRC2012_val_00000001 to 00000006"
    with pytest.raises(InputError, match=message):
        open_split(str(tmp_path), "val")


def test_ground_truth_of_other_names_counts_bad_files(tmp_path):
    expected = write_imagenet(tmp_path, count=3)
    for name in expected:
        (tmp_path / "val" / name).rename(tmp_path / "val" / name.replace("ILSVRC2012_", ""))
    (tmp_path / "val" / "val_00000002.JPEG").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 3 files .* are not images.*val_00000002"):
        open_split(str(tmp_path), "val")
    labels = labels_by_name(open_split(str(tmp_path), "val", skip_bad=True))
    synsets = list(expected.values())
    assert labels == {"val_00000001.JPEG": synsets[0], "val_00000003.JPEG": synsets[2]}
    (tmp_path / "val" / "val_00000004.JPEG").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"3 labels for 4 photos, of which 'val_00000002\.JPEG' is"
    ):
        open_split(str(tmp_path), "val")


def test_imagenet_with_photos(tmp_path, shared_data):
    """Real photos get the label of their own synset. The kit's files may lie beside them."""
    folders = [
        path for path in sorted((shared_data / "imagenet-sample").iterdir()) if path.is_dir()
    ]
    synsets = {1: folders[2].name, 2: folders[0].name, 3: folders[1].name}
    expected = {}
    for number, folder in enumerate(reversed(folders[:3])):
        photo = min(folder.iterdir()).read_bytes()
        for path in (Path("train", folder.name, "x.JPEG"), Path("val", f"val_{number}.JPEG")):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(photo)
        expected[f"val_{number}.JPEG"] = folder.name
    number_of = {synset: number for number, synset in synsets.items()}
    write_devkit(tmp_path / "val", synsets, [number_of[name] for name in expected.values()])
    validation = open_split(str(tmp_path), "val")
    assert labels_by_name(validation) == expected
    for example in list_examples(validation):
        synset = validation.classes[example["label"]]
        assert (tmp_path / "train" / synset / "x.JPEG").read_bytes() == example["encoded"]


LIST = """file,label,split
photos/a.jpg,ants,train
photos/b.jpg,bees,Train
photos/c.jpg,ants,training
{absolute}/d.jpg,bees,val
photos\\e.jpg,ants,test
"""


def test_list_with_splits(tmp_path):
    write_images(tmp_path / "photos", *(f"{name}.jpg" for name in "abcde"))
    path = tmp_path / "list.csv"
    path.write_text(LIST.format(absolute=tmp_path / "photos"))
    assert split_names(str(path)) == ("train", "validation", "test")
    train, validation = open_train_val(str(path))
    assert labels_by_name(train) == {"a.jpg": "ants", "b.jpg": "bees", "c.jpg": "ants"}
    assert labels_by_name(validation) == {"d.jpg": "bees"}
    assert labels_by_name(open_split(str(path), "test")) == {"e.jpg": "ants"}


def test_list_says_which_columns_it_ignores(tmp_path, caplog):
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "LIST.CSV").write_text("file\tlabel\tis_valid\na.jpg\tants\t0\nb.jpg\tbees\t1\n")
    with caplog.at_level("INFO", "vgg_jax"):
        assert open_split(str(tmp_path / "LIST.CSV"), "train").size == 2
    assert "ignored the columns of" in caplog.text and "'is_valid'" in caplog.text


def test_list_never_takes_names_of_columns_for_a_class(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text("Bild,Klasse\na.jpg,ants\nb.jpg,bees\n")
    with pytest.raises(InputError, match="'Bild' in line 1"):
        open_split(str(tmp_path / "list.csv"), "train", skip_bad=True)


def test_list_of_excel(tmp_path):
    """Excel's "Unicode text" is UTF-16, with tabs."""
    write_images(tmp_path, "a.jpg", "\u00e9.jpg", "c.jpg")
    path = tmp_path / "list.txt"
    path.write_text("file\tlabel\na.jpg\tants\n\u00e9.jpg\tbees\nc.jpg\tants\n", "utf-16")
    assert labels_by_name(open_split(str(path), "train"))["\u00e9.jpg"] == "bees"


def test_list_without_splits(tmp_path):
    write_images(tmp_path, *(f"{i}.png" for i in range(12)))
    path = tmp_path / "photos.txt"
    path.write_text("".join(f"{i}.png {i % 11}\n" for i in range(12)))
    train, validation = open_train_val(str(path))
    assert (train.size, validation.size) == (11, 1)
    assert train.classes == tuple(map(str, range(11)))  # in the order of the numbers


@pytest.mark.parametrize(
    "content,message",
    [
        (
            "a.jpg,ants\nmissing.jpg,bees\n",
            "1 of the 2 files .* not exist.*'missing.jpg' in line 2",
        ),
        ("a.jpg,ants,train\nb.jpg,bees,holdout\n", "line 2 of .* has the split 'holdout'"),
        ("a.jpg,ants\na.jpg,bees\n", "line 2 of .* a second label"),
        ("a.jpg,ants,train\nb.jpg,bees,train\na.jpg,wasps,val\n", "line 3 .* no training image"),
        ("https://host/a.jpg,ants\nb.jpg,bees\n", "line 1 .* names 'https://host/a.jpg'"),
        ("a.jpg,ants,4,5\nb.jpg,bees,4,5\n", "line 1 of .* has the split '4'"),
        ("file,label\na.jpg,ants\nb.jpg,bees,val\n", "line 3 of .* has 3 columns: .* the 2 of"),
        ("", "is empty"),
        ("file,label\n", "has names of columns only"),
        ("Bild,Klasse\na.jpg,ants\nb.jpg,bees\n", "'Bild' in line 1: .* names of columns has"),
        ("ants,a.jpg\nbees,b.jpg\n", "files in its second column, for example 'a.jpg'"),
        ("0,a.jpg,ants\n1,b.jpg,bees\n", "files in its second column"),
        ("a.jpg,ants\n".encode("utf-16-le"), "it is not UTF-8"),
        ("a.jpg,ants\nb.jpg,ants\n", "only one class, 'ants'"),
    ],
)
def test_wrong_list(tmp_path, content, message):
    write_images(tmp_path, "a.jpg", "b.jpg")
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_train_val(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("listed,stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form(tmp_path, listed, stored):
    """macOS changes the form of names, and a list made there keeps it."""
    name = "Käfer.png"
    write_classes(tmp_path / "train", "ants", "bees")
    write_images(tmp_path / "val", unicodedata.normalize(stored, name))
    line = f"{unicodedata.normalize(listed, name)},bees\n"
    (tmp_path / "val.csv").write_text(line, "utf-8")
    assert list(labels_by_name(open_split(str(tmp_path), "val")).values()) == ["bees"]
    (tmp_path / "list.csv").write_text(f"val/{line}", "utf-8")
    assert list(labels_by_name(open_split(str(tmp_path / "list.csv"), "train")).values()) == [
        "bees"
    ]


@pytest.mark.parametrize(
    "lines",
    [
        "train/1.png,ants\ntrain/2.png,bees\nval/1.png,bees\n",
        "file,label,split\n1.png,ants,train\n2.png,bees,Training\n1.png,bees,valid\n",
    ],
)
def test_label_file_with_equal_names_in_two_splits(tmp_path, lines):
    write_images(tmp_path / "train", "1.png", "2.png")
    write_images(tmp_path / "val", "1.png")
    (tmp_path / "labels.csv").write_text(lines)
    train, validation = open_train_val(str(tmp_path))
    assert labels_by_name(train) == {"1.png": "ants", "2.png": "bees"}
    assert labels_by_name(validation) == {"1.png": "bees"}


def test_label_file_with_a_column_of_splits(tmp_path):
    write_images(tmp_path / "flat", "1.png", "2.png")
    (tmp_path / "flat" / "labels.csv").write_text("1,ants,train\n2,bees,val\n")
    message = "1 of 2 photos have no label in .* '2.png': .* other splits, so pass it as DATA"
    with pytest.raises(InputError, match=message):
        open_split(str(tmp_path / "flat"), "train")


def test_folder_named_solution(tmp_path):
    """Boxes are in Kaggle's file only, and a label may have spaces elsewhere."""
    root = tmp_path / "solutions"
    write_images(root / "train", "a.png", "b.png")
    (root / "train.csv").write_text("a.png,golden retriever\nb.png,bees\n")
    assert open_split(str(root), "train").classes == ("bees", "golden retriever")


@pytest.mark.parametrize(
    "line,cells",
    [
        ("1.jpg ants", ("1.jpg", "ants", None)),
        ("1.jpg ants val", ("1.jpg", "ants", "val")),
        ("1.jpg golden retriever", ("1.jpg", "golden retriever", None)),
        ("my 1.jpg  golden retriever  Test", ("my 1.jpg", "golden retriever", "Test")),
        ("my 1.jpg (2).jpg ants", ("my 1.jpg (2).jpg", "ants", None)),
        ("St. Bernard/1.jpg 3", ("St. Bernard/1.jpg", "3", None)),
        ("my photo ants", ("my photo", "ants", None)),
        ("1.raw golden retriever", ("1.raw", "golden retriever", None)),
        ("#1.jpg ants", ("#1.jpg", "ants", None)),
        ("#1.jpg,ants", ("#1.jpg", "ants", None)),
    ],
)
def test_line_of_words(tmp_path, line, cells):
    """The last word is a split if it is the name of one. The file and the label may have spaces."""
    (tmp_path / "list.txt").write_text(f"# a comment\n#, and another\n{line}\n")
    assert read_rows(str(tmp_path / "list.txt")) == [(*cells, 3)]


@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_list_with_names_that_begin_as_comments(tmp_path, suffix):
    write_images(tmp_path, "#1.jpg", "2.jpg")
    lines = "# made by hand\n#1.jpg,ants\n2.jpg,bees\n"
    (tmp_path / f"list.{suffix}").write_text(lines)
    source = open_split(str(tmp_path / f"list.{suffix}"), "train")
    assert labels_by_name(source) == {"#1.jpg": "ants", "2.jpg": "bees"}


@pytest.mark.parametrize("first,warns", [(1, True), (0, False)])
def test_numbers_that_may_count_from_one(tmp_path, caplog, first, warns):
    write_classes(tmp_path / "train", "ants", "bees", "wasps")
    write_images(tmp_path / "val", "a.png", "b.png")
    (tmp_path / "val.csv").write_text(f"a.png,{first}\nb.png,{first + 1}\n")
    open_split(str(tmp_path), "val")
    assert ("no label of" in caplog.text) == warns


def test_lines_without_a_photo_are_counted(tmp_path, caplog):
    caplog.set_level("INFO", "vgg_jax")
    write_images(tmp_path / "train", "1.png", "2.png")
    (tmp_path / "train" / "labels.csv").write_text("1.png,ants\n2.png,bees\ngone.png,ants\n")
    assert open_split(str(tmp_path), "train").size == 2
    assert "1 lines of" in caplog.text and "for example 'gone.png'" in caplog.text
    assert "skipped" not in caplog.text  # the label file is used


def test_classes_that_differ_in_capital_letters(tmp_path, caplog):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "list.csv").write_text("1.png,bees\n2.png,Bees\n3.png,ants\n")
    assert open_split(str(tmp_path / "list.csv"), "train").classes == ("Bees", "ants", "bees")
    assert "the classes 'Bees' and 'bees' differ only in capital letters" in caplog.text


def test_list_whose_files_have_moved(tmp_path):
    (tmp_path / "list.csv").write_text("a/1.png,ants\na/2.png,bees\n")
    with pytest.raises(InputError, match="move the list to the folder that its paths start from"):
        open_split(str(tmp_path / "list.csv"), "train")


def test_list_that_repeats_files(tmp_path, caplog):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    lines = "file,label,split\na.png,x,train\na.png,x,train\nb.png,y,train\nb.png,y,val\n"
    (tmp_path / "list.csv").write_text(lines)
    train, validation = open_train_val(str(tmp_path / "list.csv"))
    assert (train.size, validation.size) == (3, 1)
    assert "1 lines of" in caplog.text and "repeat a file of the train split" in caplog.text
    assert "1 files of" in caplog.text and "two splits, train and val" in caplog.text
