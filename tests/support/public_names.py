"""Writes `self_rewarding_lm/__init__.pyi`: python -m tests.support.public_names"""

from pathlib import Path

import self_rewarding_lm

PATH = Path(self_rewarding_lm.__file__).with_suffix(".pyi")


def stub() -> str:
    """The public names as editors and type checkers read them."""
    names_of = {f"{self_rewarding_lm.__name__}.{f}": n for f, n in self_rewarding_lm.NAMES.items()}
    for name, kind in self_rewarding_lm.kinds().items():
        names_of[kind.__module__] = f"{names_of.get(kind.__module__, '')} {name}"
    lines = [
        '"""The public names, for editors. Written by `python -m tests.support.public_names`."""',
        "",
        *(
            f"from {file} import {', '.join(sorted(n.split()))}"
            for file, n in sorted(names_of.items())
        ),
        "",
        "__version__: str",
        "__all__ = [",
        *(f'    "{name}",' for name in self_rewarding_lm.__all__),
        "]",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(stub())
