"""Which files are images, by their first bytes, and which files of a folder are none by name.

Training, evaluation, prediction and `vgg-jax verify-data` follow these rules.
"""

import os
import stat

HEADER_BYTES = 24  # enough to recognise each format
FORMATS = "JPEG, PNG, GIF, BMP, WebP, TIFF, PNM, AVIF or JPEG 2000"

# The first bytes of each format, for `str.startswith`.
_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"II+\0",  # BigTIFF
    b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",  # JPEG 2000 without its container
)
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".j2k", ".heic"),
    )
)
_SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "thumbs.db:encryptable", "desktop.ini", "icon\r", "@eadir"),
        *("__macosx", "__pycache__", "lost+found", "$recycle.bin", "system volume information"),
    )
)
# Of texts, tables, pages, and of what cameras and programs put beside photos.
_NOTE_SUFFIXES = frozenset(
    (
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".ini", ".log"),
        *(".md", ".rst", ".html", ".htm", ".pdf", ".url", ".xls", ".xlsx", ".mat", ".py", ".sh"),
        *(".xmp", ".aae", ".thm", ".pp3", ".dop", ".mov", ".mp4", ".avi"),
    )
)
_NOTE_NAMES = frozenset(("readme", "license", "licence", "copying", "copyright", "authors"))


def is_image(header: bytes) -> bool:
    """Tells whether a file begins as an image of one of the `FORMATS` does.

    Extensions are not reliable: ImageNet has a PNG that is named .JPEG.

    Args:
        header: The first `HEADER_BYTES` bytes of the file, or all of a shorter one.

    Returns:
        True for an image.
    """
    return (
        header.startswith(_SIGNATURES)
        or (header.startswith(b"RIFF") and header[8:12] == b"WEBP")
        or (header[4:8] == b"ftyp" and header[8:12] in (b"avif", b"avis"))
        or _is_bmp(header)
        or _is_pnm(header)
    )


def is_heic(header: bytes) -> bool:
    """Tells whether a file begins as the photos of a phone in HEIC do, which Pillow cannot read.

    Args:
        header: As for `is_image`.

    Returns:
        True for HEIC.
    """
    return header[4:8] == b"ftyp" and header[8:12] in _HEIC_BRANDS


def has_image_suffix(name: str) -> bool:
    """Tells whether a file claims to be an image by its name.

    Args:
        name: Name or path of the file.

    Returns:
        True for names such as "a.JPG".
    """
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def is_system_name(name: str) -> bool:
    """Tells whether a name belongs to an operating system or a program, or is hidden.

    Args:
        name: Name of a file or of a folder, without its path: "Thumbs.db", "._a.jpg".

    Returns:
        True for names that are no part of the data.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_note(name: str) -> bool:
    """Tells whether a file that is not an image may lie beside photos: labels, a README.

    Args:
        name: Name of a file, without its path.

    Returns:
        True for names of notes.
    """
    stem, suffix = os.path.splitext(name.lower())
    return suffix in _NOTE_SUFFIXES or (not suffix and stem in _NOTE_NAMES)


def read_local_header(path: str | bytes) -> bytes:
    """Reads the first bytes of a file on this machine.

    Args:
        path: Path of the file, or of a link to it.

    Returns:
        At most `HEADER_BYTES` bytes; none if this is no file or it cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return os.read(descriptor, HEADER_BYTES) if is_file else b""
        finally:
            os.close(descriptor)
    except OSError:
        return b""


def _is_bmp(header: bytes) -> bool:
    # A text may begin with "BM" too. So the size of the second header is looked at.
    return header.startswith(b"BM") and int.from_bytes(header[14:18], "little") in _BMP_HEADER_SIZES


def _is_pnm(header: bytes) -> bool:
    return header[:1] == b"P" and header[1:2] in b"123456" and header[2:3].isspace()
