"""The first bytes by which a file shows what it is, whatever its name says."""

from collections.abc import Mapping

from schemas.errors import InputError

MARK_BYTES = 10  # the longest mark

# Sources: RFC 1952 (gzip), RFC 8878 (zstd), the bzip2, xz, ZIP, Parquet, Arrow and Avro format documents, Unicode 15.0
# chapter 23.8 (byte order marks).
_MARKS: Mapping[bytes, tuple[str, str]] = {
    b"\x1f\x8b\x08": ("gzip", "gzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it first (zstd -d)"),
    b"\xfd7zXZ\0": ("xz", "unpack it first (xz -d)"),
    b"PK\x03\x04": ("a ZIP archive", "unpack it first (unzip)"),
    b"\x04\x22\x4d\x18": ("lz4", "unpack it first (lz4 -d)"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first (7z x)"),
    b"PAR1": ("parquet", "parquet"),
    b"ARROW1\0\0": ("an Arrow file", "write it as parquet (pyarrow.parquet.write_table)"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "write it as parquet (pyarrow.parquet.write_table)"),
    b"Obj\x01": ("Avro", "write it as .jsonl or parquet"),
    b"\x89HDF\r\n\x1a\n": ("HDF5", "write it as .jsonl or parquet"),
    b"\xff\xfe": ("text in UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    b"\xfe\xff": ("text in UTF-16", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    b"%PDF-": ("a PDF", "write its text as .txt"),
    b"version ht": ("a Git LFS pointer", "fetch what it stands for (git lfs pull)"),
}
_BZIP2 = (b"BZh", b"1AY&SY")  # between them one digit


def refuse_other_kind(kind: str, head: bytes, where: object) -> None:
    """Refuse a file whose first bytes say that it is something else than its kind.

    Args:
        kind: how the file is read (`inputs.SUFFIXES`).
        head: its first bytes, MARK_BYTES of them or all.

    Raises:
        InputError: it is something else that we know.
    """
    if kind == ".array_record":  # begins with any bytes
        return
    packed = kind.endswith(".gz")
    found, advice = _mark(head)
    wanted = "gzip" if packed else "parquet" if kind == ".parquet" else ""
    if packed and not found and head:
        found, advice = "not packed" if _is_text(head) else "something else", "rename it without .gz, if it is text"
    if not found or found == wanted or (kind == ".parquet" and head[:4] == b"PAR1"):
        return
    if advice == "gzip":
        advice = f"rename it to end in {kind}.gz" if kind in (".txt", ".jsonl") else "unpack it first (gzip -d)"
    elif advice == "parquet":
        advice = "rename it to end in .parquet, or set data.format to parquet"
    raise InputError(
        "a file cannot be read as what its name says",
        {"file": where, "found": found, "expected": wanted or f"plain text ({kind})"},
        advice,
    )


def _mark(head: bytes) -> tuple[str, str]:
    if head[:3] == _BZIP2[0] and head[4:10] == _BZIP2[1]:
        return "bzip2", "unpack it first (bzip2 -d)"
    return next((said for mark, said in _MARKS.items() if head.startswith(mark)), ("", ""))


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in head)
