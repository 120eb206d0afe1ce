"""Whether the code can be found one's way in: no file too long to read, no folder too full."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

MOST_LINES, MOST_FILES = 300, 16


def main() -> int:
    """Print what is too large; 1 if anything is."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [path for path in map(Path, listed.stdout.splitlines()) if path.is_file()]
    problems = []
    for path in paths:
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MOST_LINES:
            problems.append(f"{path}: {count} lines, at most {MOST_LINES}: two concepts?")
    for folder, count in Counter(path.parent for path in paths).items():
        if count > MOST_FILES:
            problems.append(f"{folder}: {count} files, at most {MOST_FILES}: two rooms?")
    print("\n".join(problems) or f"{len(paths)} files in their rooms")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
