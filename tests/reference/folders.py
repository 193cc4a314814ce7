"""What a folder holds, to compare before and after."""

from __future__ import annotations

from pathlib import Path


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder``, hidden files too: a file's bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
