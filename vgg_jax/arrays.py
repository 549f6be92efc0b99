"""Images and labels in memory, or in an .npz file, as the data of a run. Without TensorFlow."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vgg_jax.division import SPLIT_NAMES, divide_by_class, split_kind
from vgg_jax.errors import InputError, single_line
from vgg_jax.paths import to_path

logger = logging.getLogger(__name__)

IN_MEMORY = "<arrays>"  # the `data` of a run whose arrays have no file; no name of a folder

MAX_CLASSES = 100_000  # larger labels are no class numbers

# Names of arrays in files without names of splits, in lower case.
_WITHOUT_SPLIT = (("images", "labels"), ("x", "y"), ("data", "labels"), ("data", "target"))
_CLASS_NAMES = ("classes", "class_names", "label_names")
# Errors that np.load and zipfile raise for damaged or foreign files.
NPZ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class Arrays(NamedTuple):
    """Images and labels of one split, checked."""

    images: np.ndarray  # uint8 (n, H, W, 3) or (n, H, W, 1)
    labels: np.ndarray  # int32 (n,)
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """The examples of a split in memory, or of a part of it.

    It has the attributes of `vgg_jax.data.DataSource` that do not concern files.

    Attributes:
        name: Name for messages: "mnist.npz train".
        storage: A digest of all images and labels of the split.
        classes: Names of the classes. A label is an index into them.
        images: The images of the whole split, uint8 (n, H, W, 3) or (n, H, W, 1).
        all_labels: Their labels, int32 (n,).
        indices: Positions of the examples in the split, int64, sorted.
        skipped: Nothing.
    """

    name: str
    storage: str
    classes: tuple[str, ...]
    images: np.ndarray
    all_labels: np.ndarray
    indices: np.ndarray
    skipped: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """Labels of the examples, int32 (size,)."""
        return self.all_labels[self.indices]

    def file_name(self, index: int) -> str:
        """Name of an example, by its position in the split."""
        return f"{self.name.removesuffix(' (held out)')} {index}"


def check_arrays(
    images: Any,
    labels: Any,
    name: str,
    classes: Sequence[str] | np.ndarray | None = None,
    *,
    may_lack_classes: bool = False,
) -> Arrays:
    """Checks images and labels, and converts them.

    Args:
        images: uint8 (n, H, W, 3), or grey (n, H, W) or (n, H, W, 1). Whole numbers from 0 to 255
            of another type are converted.
        labels: Class numbers from 0 or class names, (n,) or (n, 1).
        name: Name of the two for messages.
        classes: Names of the classes. None takes the names among the labels, sorted, or numbers.
        may_lack_classes: The labels need not have most of the numbers up to the largest one.

    Returns:
        The arrays.

    Raises:
        InputError: A value, a shape or a length is wrong.
    """
    pixels = _check_images(images, f"the images of {name}")
    class_names = None if classes is None else _check_classes(classes, f"the classes of {name}")
    numbers, names = _check_labels(
        labels, f"the labels of {name}", class_names, may_lack_classes=may_lack_classes
    )
    if len(pixels) != len(numbers):
        raise InputError(
            f"{name}: {len(pixels)} images and {len(numbers)} labels; expected one label for each "
            "image"
        )
    return Arrays(pixels, numbers, names)


def _to_array(values: Any, name: str, expected: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of unequal lengths, or a GPU's
        raise InputError(
            f"{name} are no array ({single_line(error)}): expected {expected}"
        ) from error
    if array.dtype != object:
        return array
    # A column of pandas has str, and a data set of h5py has bytes.
    for text_type in (str, bytes):
        if all(isinstance(item, text_type) for item in array.flat):
            return np.array(array.tolist())
    types = ", ".join(sorted({type(item).__name__ for item in array.flat})[:5])
    raise InputError(
        f"{name} are Python objects ({types}), perhaps with missing values or arrays of several "
        f"sizes: expected {expected}"
    )


def _check_images(images: Any, name: str) -> np.ndarray:
    expected = "uint8 (N, H, W, 3), or grey (N, H, W)"
    array = _to_array(images, name, expected)
    if array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        raise InputError(
            f"{name} have the shape {array.shape}: expected {expected}, with the channels last; "
            "pass np.moveaxis(images, 1, -1)"
        )
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3)):
        raise InputError(f"{name} have the shape {array.shape}: expected {expected}")
    if 0 in array.shape:
        raise InputError(f"{name} have the shape {array.shape}: expected at least one image")
    pixels = _to_uint8(array, name)
    if pixels.max() <= 1:
        logger.warning(
            f"{name} are from 0 to {pixels.max()}, all but black: expected uint8 from 0 to 255"
        )
    return pixels if array.ndim == 4 else pixels[..., None]


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Converts pixels to uint8 if that is clearly what they are."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} are of type {array.dtype}: expected uint8 from 0 to 255")
    smallest, largest = array.min(), array.max()
    if not np.isfinite(smallest) or not np.isfinite(largest):
        raise InputError(f"{name} hold NaN or infinity: expected uint8 from 0 to 255")
    description = f"{name} are {array.dtype} from {smallest:.6g} to {largest:.6g}"
    if smallest < 0 or largest > 255:
        advice = ", the mean not subtracted" if smallest < 0 else ""
        raise InputError(f"{description}: expected uint8 from 0 to 255{advice}")
    pixels = array.astype(np.uint8)
    if array.dtype.kind == "f" and (largest <= 1 or not np.array_equal(pixels, array)):
        factor = "images * 255" if largest <= 1 else "images"
        raise InputError(
            f"{description}: expected uint8 from 0 to 255; pass np.round({factor}).astype(np.uint8)"
        )
    return pixels


def _check_classes(classes: Any, name: str) -> tuple[str, ...]:
    """Converts names of classes to texts."""
    expected = "one name for each class, (K,)"
    array = _decode(_to_array(classes, name, expected))
    if array.ndim != 1 or array.dtype.kind not in "Uiu":
        raise InputError(f"{name} are {array.dtype} {array.shape}: expected {expected}")
    return tuple(map(str, array.tolist()))


def _decode(array: np.ndarray) -> np.ndarray:
    """Decodes an array of bytes; leaves another one."""
    return np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array


def _check_labels(
    labels: Any, name: str, classes: tuple[str, ...] | None, *, may_lack_classes: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Converts labels to class numbers, int32 (n,). Returns the names of the classes as well."""
    expected = "class numbers (N,) from 0, or class names"
    array = _to_array(labels, name, expected)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        advice = "; pass labels.argmax(1) of one-hot labels" if array.ndim == 2 else ""
        raise InputError(f"{name} have the shape {array.shape}: expected {expected}{advice}")
    if array.dtype.kind in "US":
        return _numbers_of_names(array, name, classes)
    if array.dtype.kind not in "iufb":
        raise InputError(f"{name} are of type {array.dtype}: expected {expected}")
    if array.dtype.kind == "f" and not np.all(np.isfinite(array) & (array == np.floor(array))):
        raise InputError(
            f"{name} are no whole numbers, or hold NaN or infinity: expected {expected}"
        )
    if not len(array):
        return array.astype(np.int32), classes or ()
    smallest, largest, count = int(array.min()), int(array.max()), len(np.unique(array))
    description = f"{name} are from {smallest} to {largest}"
    if smallest < 0 or (classes is not None and largest >= len(classes)):
        bound = "K - 1" if classes is None else f"{len(classes) - 1}"
        raise InputError(f"{description}: expected numbers from 0 to {bound}")
    if classes is None and largest >= (MAX_CLASSES if may_lack_classes else 2 * count + 10):
        raise InputError(
            f"{description} with {count} different values: expected numbers from 0 to {count - 1}; "
            "pass np.unique(labels, return_inverse=True)[1]"
        )
    names = tuple(map(str, range(largest + 1))) if classes is None else classes
    return array.astype(np.int32), names


def _numbers_of_names(
    array: np.ndarray, name: str, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = _decode(array)
    names = tuple(np.unique(texts).tolist()) if classes is None else classes
    number_of = {text: i for i, text in enumerate(names)}
    unknown = [text for text in np.unique(texts).tolist() if text not in number_of]
    if unknown:
        raise InputError(
            f"{name} have {unknown[0]!r}: expected some of the {len(names)} classes, such as "
            f"{names[0]!r}"
        )
    return np.array([number_of[text] for text in texts.tolist()], np.int32), names


def train_val_sources(
    train: Arrays,
    validation: Arrays | None,
    name: str,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[ArraySource, ArraySource]:
    """Makes the training and the validation source of a run.

    Args:
        train: The training images.
        validation: The validation images, or None to hold out a part of each class.
        name: Name of the data.
        validation_fraction: Fraction to hold out.
        seed: Seed of the choice.

    Returns:
        The two sources.

    Raises:
        InputError: There are fewer than two classes, or no image can be held out.
    """
    present = np.unique(train.labels)
    if len(present) < 2:
        raise InputError(
            f"all labels of {name} are {train.classes[present[0]]!r}: expected at least two classes"
        )
    if len(present) < len(train.classes):
        absent = next(i for i in range(len(train.classes)) if i not in set(present.tolist()))
        logger.warning(
            f"{len(train.classes) - len(present)} of the {len(train.classes)} classes of {name} "
            f"have no training image, for example {train.classes[absent]!r}"
        )
    source = whole_source(train, f"{name} train")
    if validation is not None:
        largest = int(validation.labels.max())
        if largest >= len(train.classes):
            raise InputError(
                f"the validation labels of {name} are up to {largest}: expected numbers from 0 to "
                f"{len(train.classes) - 1}, as the training labels"
            )
        return source, whole_source(validation, f"{name} validation")
    division = divide_by_class(source.name, source.classes, train.labels, validation_fraction, seed)
    held_out = dataclasses.replace(
        source, name=f"{source.name} (held out)", indices=division.held_out
    )
    return dataclasses.replace(source, indices=division.train), held_out


def whole_source(arrays: Arrays, name: str) -> ArraySource:
    """Makes a source of all images of a split.

    Args:
        arrays: The split.
        name: Its name.

    Returns:
        The source.
    """
    return ArraySource(
        name=name,
        storage=f"arrays {arrays.images.shape}, digest {_digest(arrays)}",
        classes=arrays.classes,
        images=arrays.images,
        all_labels=arrays.labels,
        indices=np.arange(len(arrays.labels)),
    )


def _digest(arrays: Arrays) -> str:
    """Digest of the pixels and the labels."""
    digest = hashlib.sha256()
    for array in (arrays.images, arrays.labels):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def read_npz(
    path: str | os.PathLike, kinds: Collection[str] = tuple(SPLIT_NAMES)
) -> dict[str, Arrays]:
    """Reads splits of an .npz file.

    Args:
        path: The file. It holds arrays only, no pickles.
        kinds: The splits to read, of "train", "validation" and "test".

    Returns:
        The splits by kind, as far as the file has them. Their classes are those that the file
        names, or those of the training labels.

    Raises:
        InputError: The file cannot be read, has no images and labels of known names, or a split is
            wrong.
    """
    name = os.fspath(path)
    with _open_npz(name) as content:
        pairs = _find_pairs(content, name)
        class_key = next((key for key in content if key.lower() in _CLASS_NAMES), None)
        classes: Any = None if class_key is None else content[class_key]
        train_labels = content[pairs["train"][1]] if "train" in pairs else None
        splits = {
            kind: (content[images], content[labels])
            for kind, (images, labels) in pairs.items()
            if kind in kinds
        }
    if classes is None and train_labels is not None:
        _, classes = _check_labels(train_labels, f"the labels of {name} train", None)
    # A split without training labels may have few images of many classes.
    return {
        kind: check_arrays(*split, f"{name} {kind}", classes, may_lack_classes=True)
        for kind, split in splits.items()
    }


def npz_split_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Lists the splits of an .npz file, of "train", "validation" and "test".

    Args:
        path: The file.

    Returns:
        Their kinds.

    Raises:
        InputError: The file cannot be read, or has no images and labels of known names.
    """
    name = os.fspath(path)
    with _open_npz(name) as content:
        return tuple(_find_pairs(content, name))


@contextlib.contextmanager
def _open_npz(name: str) -> Iterator[Mapping[str, np.ndarray]]:
    """Opens a file, whose arrays are read when they are asked for, and translates its errors."""
    try:
        with to_path(name).open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with content:
                yield content
    except FileNotFoundError as error:
        raise InputError(
            f"no file {name!r}: expected an .npz file with images and labels"
        ) from error
    except InputError:
        raise
    except NPZ_ERRORS as error:
        reason = single_line(error)
        if "pickle" in reason:  # NumPy's message says how to load them, which is unsafe
            reason = "it is no .npz file, or holds Python objects"
        raise InputError(
            f"{name!r} cannot be read ({reason}): expected an .npz file of arrays of "
            "numbers or texts, as np.savez writes it"
        ) from error


def _find_pairs(content: Mapping[str, np.ndarray], name: str) -> dict[str, tuple[str, str]]:
    """Finds the names of the images and the labels of each split."""
    keys = {key.lower(): key for key in content}
    pairs = {}
    for split, prefixes in SPLIT_NAMES.items():
        candidates = [pair for prefix in prefixes for pair in _key_pairs(prefix)]
        if split == "train":
            candidates += _WITHOUT_SPLIT
        for images, labels in candidates:
            if images in keys and labels in keys:
                pairs[split] = keys[images], keys[labels]
                break
    if not pairs:
        raise InputError(
            f"{name!r} has the arrays {', '.join(content)}: expected images and labels, such as "
            "x_train and y_train, train_images and train_labels, or images and labels"
        )
    return pairs


def _key_pairs(prefix: str) -> list[tuple[str, str]]:
    return [
        (f"x_{prefix}", f"y_{prefix}"),
        (f"{prefix}_x", f"{prefix}_y"),
        (f"{prefix}_images", f"{prefix}_labels"),
        (f"images_{prefix}", f"labels_{prefix}"),
    ]


def open_npz_split(path: str | os.PathLike, split: str) -> ArraySource:
    """Opens a whole split of an .npz file.

    Args:
        path: The file.
        split: Name of the split, as `split_kind` knows it.

    Returns:
        The source.

    Raises:
        InputError: The file cannot be read, or lacks the split.
    """
    names, name = npz_split_names(path), os.fspath(path)
    kind = split_kind(split) or split
    if kind not in names:
        raise InputError(f"{name!r} has no split {split!r}: expected one of {', '.join(names)}")
    return whole_source(read_npz(path, [kind])[kind], f"{name} {kind}")


def default_settings(images: np.ndarray, image_size: int | None = None) -> dict[str, Any]:
    """Settings of a run that suit the size of its images.

    Images of up to 64 pixels get those of CIFAR-10's preset, and larger ones the paper's.

    Args:
        images: The images, (n, H, W, ...).
        image_size: Side of the crop, or None for that of the images, between 32 and 224.

    Returns:
        Fields of TrainConfig.
    """
    size = image_size or min(max(min(images.shape[1:3]), 32), 224)
    if size > 64:
        return {"image_size": size}
    small = {"fc": (512, 512), "batch_size": 128, "learning_rate": 1e-2}
    return small | {"image_size": size, "scale": (size, size * 5 // 4)}
