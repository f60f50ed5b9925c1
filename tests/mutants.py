"""make mutants: puts each fault of faults.py into a copy of the tree and runs the tests on it.

The copy is build/mutants/tree. A fault in csrc recompiles only the files that include it; the
emulator of tests/ptx compiles a fault in csrc/cuda. The tests that are expected to find the fault
run first, then the whole suite; both stop at the first failure. The exit status is 1 if a fault
survives.

    python tests/mutants.py [--list] [--expected-only] [part of a name ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from faults import CUDA, FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {".h", ".cuh", ".cu", ".cpp", ".py"}
TIMEOUT = 1800.0  # seconds of one run of the tests; a fault that makes it hang counts as found
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.M)


class Outcome(NamedTuple):
    fault: Fault
    by: str  # the failed test, or what else showed the fault; "" for a survivor
    seconds: float


def place(root: Path, fault: Fault) -> Path:
    """The file that contains the fault's text. Exits unless the text occurs exactly once."""
    folder = root / fault.folder
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found = [f for f in files if f.suffix in SOURCES and fault.old in f.read_text()]
    if len(found) != 1 or found[0].read_text().count(fault.old) != 1:
        sys.exit(f"{fault.name}: expected its text once in {fault.folder}, got {found}")
    return found[0]


class Tree:
    """A compiled copy of the repository's files, and a clean copy of the build's outputs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.clean = folder / "tree", folder / "clean"
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        for name in filter(None, tracked.stdout.split("\0")):
            if (ROOT / name).is_file():
                copy_if_changed(ROOT / name, self.root / name)
        self.build()
        shutil.rmtree(self.clean, ignore_errors=True)
        for file in self.made():
            copy_if_changed(file, self.clean / file.relative_to(self.root))

    def made(self) -> list[Path]:
        """Objects and libraries, except the emulator's, which lie under a hash of their inputs."""
        build = self.root / "build"
        found = [*self.root.glob("gradfuse/_C*.so"), *build.rglob("*")]
        return [f for f in found if f.is_file() and build / "ptx" not in f.parents]

    def build(self) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.root, env={**os.environ, "GRADFUSE_CUDA": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def restore(self, file: Path, text: str, times: tuple[int, int]) -> None:
        """Restores the tree with the files' times, so that nothing is compiled again."""
        file.write_text(text)
        os.utime(file, ns=times)
        for made in self.made():
            kept = self.clean / made.relative_to(self.root)
            if kept.exists():
                copy_if_changed(kept, made)
            else:
                made.unlink()

    def test(self, fault: Fault, *arguments: str) -> str:
        """The first test that fails; "" if none does."""
        on_cuda = fault.folder == CUDA
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += [*arguments, *(["-k", "ptx"] if on_cuda else [])]
        environment = {"CI": "1", "GRADFUSE_PTX": "1" if on_cuda else "0"}
        try:
            done = subprocess.run(
                command, cwd=self.root, env={**os.environ, **environment}, timeout=TIMEOUT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"a run of {TIMEOUT:.0f} s"
        failed = FAILED.search(done.stdout)
        if failed:
            return failed[1].removeprefix("tests/")
        return "" if done.returncode in (0, 5) else f"pytest's exit status {done.returncode}"

    def outcome(self, fault: Fault, rest: bool) -> Outcome:
        start = time.monotonic()
        file = place(self.root, fault)
        text, stat = file.read_text(), file.stat()
        file.write_text(text.replace(fault.old, fault.new))
        by = ""
        try:
            if fault.folder.startswith("csrc") and fault.folder != CUDA:
                built = self.build()
                if built.returncode:
                    sys.exit(f"{fault.name}: does not compile\n{built.stdout}")
            expected = [t for t in fault.tests.split() if (self.root / t).exists()]
            by = self.test(fault, *expected)
            if not by and rest:
                by = self.test(fault, "-n", "logical", "--dist", "loadfile")
        finally:
            self.restore(file, text, (stat.st_atime_ns, stat.st_mtime_ns))
        return Outcome(fault, by, time.monotonic() - start)


def copy_if_changed(source: Path, target: Path) -> None:
    if target.exists():
        old, new = target.stat(), source.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the faults to try")
    parser.add_argument("--list", action="store_true", help="only print where each fault is")
    parser.add_argument("--expected-only", action="store_true", help="skip the whole suite")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.names or any(n in f.name for n in options.names)]
    if options.list:
        for fault in chosen:
            print(f"{place(ROOT, fault).relative_to(ROOT)}: {fault.name}: {fault.why}")
        return 0
    tree = Tree(ROOT / "build" / "mutants")
    outcomes = []
    for fault in chosen:
        done = tree.outcome(fault, rest=not options.expected_only)
        outcomes.append(done)
        print(f"{done.seconds:6.0f} s  {fault.name}: {done.by or 'SURVIVED'}", flush=True)
    survivors = [o for o in outcomes if not o.by]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} faults found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
