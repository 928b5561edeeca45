"""How long fastvit._C takes to build, kept as benchmarks/build_times.csv.

``python -m benchmarks.build_times "9.0a" --jobs 2 --write`` builds from nothing in a folder of its own, on an idle
machine; without architectures it reads what ninja noted of the build that lies under build/.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import committed, harness

TABLE = Path(__file__).parent / "build_times.csv"
SOURCES = ("csrc/*.*", "csrc/ops/*", "csrc/cpu/*", "csrc/cuda/*", "setup.py")
# Seconds on two cores: for one architecture, and for all that a wheel has.
LIMIT_ONE, LIMIT_ALL = 300.0, 900.0


@dataclass(frozen=True)
class BuildTime:
    """One build from nothing.

    ``seconds`` is its wall time, ``job_seconds`` that of its jobs one after another, ``jobs`` the most at once;
    ``load`` the system's average of running processes over the minute before, -1 where it was not noted.
    """

    architectures: str
    seconds: float
    job_seconds: float
    slowest: str
    slowest_seconds: float
    jobs: int
    cores: int
    load: float
    nvcc: str
    sources: str

    @property
    def limit(self) -> float:
        """The most seconds that the build may take."""
        return LIMIT_ONE if len(self.architectures.split()) == 1 else LIMIT_ALL


@dataclass(frozen=True)
class Job:
    """One output of a build: seconds since its run began, and when that was."""

    output: str
    start: float
    end: float
    began: float


def read_log(path: Path) -> list[Job]:
    """Return the last job of each output in a .ninja_log (version 7: start, end in ms, start in ns, output, hash)."""
    jobs: dict[str, Job] = {}
    lines = path.read_text().splitlines()
    if lines[0] != "# ninja log v7":
        raise RuntimeError(f"{path}: got {lines[0]!r}; accepted is '# ninja log v7'")
    for line in lines[1:]:
        start, end, stamp, output, _ = line.split("\t")
        seconds = int(start) / 1e3
        jobs[output] = Job(Path(output).name, seconds, int(end) / 1e3, int(stamp) / 1e9 - seconds)
    return list(jobs.values())


def wall_seconds(jobs: Sequence[Job]) -> float:
    """Return the wall time of a build whose outputs may come from several runs: that of all of them."""
    # What a run's jobs say of its beginning differs by the time that it takes to start one.
    runs: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: job.began):
        if runs and job.began - runs[-1][-1].began < 1.0:
            runs[-1].append(job)
        else:
            runs.append([job])
    return sum(max(job.end for job in run) - min(job.start for job in run) for run in runs)


def most_at_once(jobs: Sequence[Job]) -> int:
    """Return how many jobs of a build ran at once."""
    # An end and a start in the same millisecond are one process behind another.
    events = [(job.began + job.start, 1) for job in jobs] + [(job.began + job.end, -1) for job in jobs]
    running = most = 0
    for _, change in sorted((round(time, 2), change) for time, change in events):
        running += change
        most = max(most, running)
    return most


def describe(jobs: Sequence[Job], architectures: str, load: float) -> BuildTime:
    """Return the row of a build."""
    slowest = max(jobs, key=lambda job: job.end - job.start)
    return BuildTime(
        architectures,
        round(wall_seconds(jobs), 1),
        round(sum(job.end - job.start for job in jobs), 1),
        slowest.output,
        round(slowest.end - slowest.start, 1),
        most_at_once(jobs),
        os.cpu_count() or 0,
        load,
        importlib.import_module("fastvit._C").cuda_compiler(),
        source_hash(),
    )


def source_hash() -> str:
    """Return a hash of what fastvit._C is built from."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in harness.ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def build(architectures: str, jobs: int) -> BuildTime:
    """Build from nothing for some architectures ("8.0;9.0a"), and return the row.

    Raises:
        RuntimeError: the build failed.
    """
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", folder, "--build-lib", folder],
            cwd=harness.ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "TORCH_CUDA_ARCH_LIST": architectures, "MAX_JOBS": str(jobs)},
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"the build failed:\n{(result.stderr or result.stdout)[-3000:]}")
        (log,) = Path(folder).rglob(".ninja_log")
        return describe(read_log(log), architectures.replace(";", " ").replace(".", ""), load)


def read() -> list[BuildTime]:
    """Return the committed table."""
    return committed.read_rows(BuildTime, TABLE)


def write(rows: Sequence[BuildTime]) -> None:
    """Write the table."""
    committed.write_rows(BuildTime, rows, TABLE)


def main() -> None:
    """Measure or read a build; print it and, with --write, put it into the table in the place of its like."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="?", default="", help='as TORCH_CUDA_ARCH_LIST: "9.0a", "8.0;9.0a"')
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if options.architectures:
        row = build(options.architectures, options.jobs)
    else:
        log = max(harness.ROOT.glob("build/temp*/fastvit._C/.ninja_log"), key=lambda path: path.stat().st_mtime)
        row = describe(read_log(log), importlib.import_module("fastvit._C").cuda_architectures(), -1.0)
    print(row)
    if options.write:
        write([*(old for old in (read() if TABLE.exists() else ()) if old.architectures != row.architectures), row])


if __name__ == "__main__":
    main()
