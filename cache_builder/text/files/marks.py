"""File types by their first bytes, independent of the file's name."""

from collections.abc import Mapping

from distillcache.schemas.errors import InputError

MARK_BYTES = 512  # a tar archive shows itself at byte 257

# Sources: RFC 1952 (gzip), RFC 8878 (zstd), the bzip2, xz, ZIP, Parquet, Arrow, Avro, POSIX ustar and Riegeli (of which
# ArrayRecord is a kind) format documents, Unicode 15.0 chapter 23.8 (byte order marks).
_MARKS: Mapping[bytes, tuple[str, str]] = {
    b"\x1f\x8b\x08": ("gzip", "gzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it first (zstd -d)"),
    b"\xfd7zXZ\0": ("xz", "unpack it first (xz -d)"),
    b"PK\x03\x04": ("a ZIP archive", "unpack it first (unzip)"),
    b"\x04\x22\x4d\x18": ("lz4", "unpack it first (lz4 -d)"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first (7z x)"),
    b"PAR1": ("parquet", "parquet"),
    bytes.fromhex("83af70d10d884a3f"): ("ArrayRecord", "ArrayRecord"),
    b"ARROW1\0\0": ("an Arrow file", "write it as parquet (pyarrow.parquet.write_table)"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "write it as parquet (pyarrow.parquet.write_table)"),
    b"Obj\x01": ("Avro", "write it as .jsonl or parquet"),
    b"\x89HDF\r\n\x1a\n": ("HDF5", "write it as .jsonl or parquet"),
    b"\xff\xfe\0\0": ("text in UTF-32", "convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    b"\0\0\xfe\xff": ("text in UTF-32", "convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    b"\xff\xfe": ("text in UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    b"\xfe\xff": ("text in UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    b"%PDF-": ("a PDF", "write its text as .txt"),
    b"version ht": ("a Git LFS pointer", "fetch the file itself (git lfs pull)"),
}
_OWN = {".parquet": "parquet", ".array_record": "ArrayRecord"}  # kind -> what it finds in a file of its own
_TAR = slice(257, 262)
_BZIP2 = (b"BZh", b"1AY&SY")  # between them one digit


def refuse_other_kind(kind: str, head: bytes, where: object, *, packed: bool = False) -> None:
    """Refuse a file whose first bytes say that it is something else than its kind.

    Args:
        kind: how the file is read (`inputs.SUFFIXES`).
        head: its first bytes, MARK_BYTES of them or all.
        packed: these are the first bytes of what was in a .gz.

    Raises:
        InputError: it is something else that we know.
    """
    gz = kind.endswith(".gz")
    found, advice = _mark(head)
    wanted = "gzip" if gz else _OWN.get(kind, "")
    if gz and not found and head:
        found, advice = "not packed" if _is_text(head) else "something else", "rename it without .gz, if it is text"
    if not found or found == wanted:
        return
    if packed:
        advice = "unpack it" if advice in ("gzip", "parquet", "ArrayRecord") else advice
        found = f"{found} in gzip"
    elif advice == "gzip":
        advice = f"rename it to end in {kind}.gz" if kind in (".txt", ".jsonl") else "unpack it first (gzip -d)"
    elif advice in ("parquet", "ArrayRecord"):
        suffix = {own: name for name, own in _OWN.items()}[advice].removeprefix(".")
        advice = f"rename it to end in .{suffix}, or set data.format to {suffix}"
    raise InputError(
        "a file cannot be read as what its name says",
        {"file": where, "found": found, "expected": wanted or f"plain text ({kind})"},
        advice,
    )


def _mark(head: bytes) -> tuple[str, str]:
    if head[:3] == _BZIP2[0] and head[4:10] == _BZIP2[1]:
        return "bzip2", "unpack it first (bzip2 -d)"
    if said := next((said for mark, said in _MARKS.items() if head.startswith(mark)), None):
        return said
    if head[_TAR] == b"ustar":
        return "a tar archive", "unpack it first (tar -xf)"
    wide = _unmarked_utf16(head)
    return (f"text in {wide}", f"convert it to UTF-8 (iconv -f {wide} -t UTF-8)") if wide else ("", "")


def _unmarked_utf16(head: bytes) -> str:
    """Which UTF-16 a text without a byte order mark is in: every other byte of most languages' letters is 0.

    As UTF-8 such a text would be valid, and a row full of NUL characters.
    """
    even, odd = head[::2], head[1::2]
    if len(odd) > 1 and 0 not in even and odd.count(0) * 2 > len(odd):
        return "UTF-16LE"
    if len(odd) > 1 and 0 not in odd and even.count(0) * 2 > len(even):
        return "UTF-16BE"
    return ""


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in head)
