"""`decode` in Inductor."""


def install() -> None:
    return None
