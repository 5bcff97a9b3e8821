"""Numbers of things in words."""


def counted(number: int, thing: str) -> str:
    """`1 row`, `2 rows`, `1,200 rows`.

    Args:
        thing: its name, in the singular; the plural has an `s`.
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
