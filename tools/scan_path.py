"""Lists the Python files of bdprune with a function that runs during a scan.

    python tools/scan_path.py MODEL DATA [--list]

Code that runs only on import of a module does not count, nor does the command line.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import bdprune
from bdprune.analysis import MEMO


def crossed(model: Path, data: Path, **options: Any) -> list[str]:
    """Files, relative to the package, in the order in which a scan of ``model`` enters them."""
    scan = bdprune.scan
    scan(model, data, **options)  # imports all needed modules
    home = Path(bdprune.__file__).parent
    codes: dict[CodeType, None] = {}
    MEMO.clear()  # so that nothing is reused from the first scan

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            codes.setdefault(frame.f_code)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        scan(model, data, **options)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = (Path(code.co_filename) for code in codes)
    return list(dict.fromkeys(str(file.relative_to(home)) for file in files if file.is_relative_to(home)))


def main() -> None:
    """Prints the number of files, and with ``--list`` the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    files = crossed(chosen.model, chosen.data)
    if chosen.list:
        print("\n".join(files))
    print(f"{len(files)} files in {len({file.partition('/')[0] for file in files})} packages")


if __name__ == "__main__":
    main()
