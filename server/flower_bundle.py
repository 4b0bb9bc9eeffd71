"""The app bundle (FAB) of a deployed federation, built from `server/flower_app`."""

import warnings
from pathlib import Path

from common.errors import SuperLinkError

FOLDER = Path(__file__).parent / "flower_app"
FILES = (
    "LICENSE",
    "pyproject.toml",
    "hansa_app/__init__.py",
    "hansa_app/client.py",
    "hansa_app/server.py",
)


def bundle() -> bytes:
    """Return the bundle; the same bytes each time, so that its hash can be compared.

    Raises:
        SuperLinkError: The installation is not whole.
    """
    from flwr.cli.build import build_fab_from_files

    contents: dict[str, bytes | Path] = {}
    for name in FILES:
        try:
            contents[name] = (FOLDER / name).read_bytes()
        except OSError as error:
            raise SuperLinkError(
                f"{FOLDER / name}: cannot be read ({error.strerror}); install Hansa anew"
            ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own, about a library of its
        return build_fab_from_files(contents)[0]
