"""What one deliberate mistake is: a file, a piece of its text, and what it is replaced by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change to a copy of the package, and the tests that must fail on it.

    ``file`` is inside ``dsv3_mini`` unless it names a folder. ``old`` occurs in it exactly once.
    ``tests`` are test files or single tests. ``crash`` is the error of a mistake that stops rather
    than being wrong in silence; elsewhere only a failed assertion or a ValueError counts.
    """

    mistake: int
    """Its number in the list of ``tests/mutants/__init__.py``."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    crash: str = ""

    @property
    def path(self) -> str:
        """Relative to the repository."""
        return self.file if "/" in self.file else f"dsv3_mini/{self.file}"

    def apply(self, text: str) -> str:
        """The changed text of the file. Raises ValueError if ``old`` is not in it exactly once."""
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"'{self.name}': its old text occurs {found} times in {self.path}, expected once; "
                "bring tests/mutants up to date with the code"
            )
        return text.replace(self.old, self.new)
