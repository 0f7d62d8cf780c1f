"""How this library was installed here, for errors that say how to add one of its extras, and a file
that came with it."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "self-rewarding-lm"


SCHEMA = Path(__file__).resolve().parents[1] / "recipes" / "recipe.schema.json"
"""The JSON schema of recipes, as it is shipped. Reading it needs no torch."""


def schema() -> str:
    """The text of SCHEMA."""
    return SCHEMA.read_text(encoding="utf-8")


def install(extra: str) -> str:
    """The command that installs the library with an extra, from where it came.

    That is a folder, an archive or a repository, as pip wrote it down, or the checkout that is
    imported; a package index only if it came from one.
    """
    try:
        origin = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        checkout = Path(__file__).resolve().parents[2]
        origin = {"url": checkout.as_uri(), "dir_info": {}}
    url = origin.get("url", "")
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f'pip install {editable}"{url2pathname(urlsplit(url).path)}[{extra}]"'
    source = ""
    if url:
        source = f" @ {origin['vcs_info']['vcs']}+{url}" if "vcs_info" in origin else f" @ {url}"
    return f'pip install "{NAME}[{extra}]{source}"'
