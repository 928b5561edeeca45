"""The committed times of a build are inside their limits, and ninja's log is read as it is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import build_times
from benchmarks.build_times import Job

LOG = """# ninja log v7
0\t400\t1000000000000\tscratch.o\taa
5\t1005\t2000005000000\tmodule.o\tbb
6\t3006\t2000006000000\tattention.o\tcc
1006\t2006\t2001006000000\tpatches.o\tdd
3010\t3510\t2003010000000\t/somewhere/_C.so\tee
2\t2002\t3000002000000\tmodule.o\tff
2003\t2503\t3002003000000\t/somewhere/_C.so\tgg
"""


def test_the_committed_builds_are_inside_their_limits(capsys: pytest.CaptureFixture[str]) -> None:
    rows = build_times.read()
    # A build for one architecture compiles the same files for fewer.
    assert any(len(row.architectures.split()) > 1 for row in rows)
    for row in rows:
        if row.sources != build_times.source_hash():
            with capsys.disabled():
                print(f"\nstale: the sources have changed since the build for {row.architectures} was timed")
        assert row.cores <= 2, row
        assert 0.0 < row.seconds <= row.limit, row
        assert row.slowest_seconds <= row.seconds <= row.job_seconds + 1.0, row


def test_a_build_has_its_limit_by_its_architectures() -> None:
    (row, *_) = build_times.read()
    names = {"90a": 300.0, "80": 300.0, "80 90a": 900.0}
    assert {name: build_times.BuildTime(name, *list(vars(row).values())[1:]).limit for name in names} == names


def test_a_log_of_several_runs_is_read_as_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / ".ninja_log"
    path.write_text(LOG)
    jobs = build_times.read_log(path)
    assert {job.output for job in jobs} == {"scratch.o", "module.o", "attention.o", "patches.o", "_C.so"}
    # 0.4 s, then 3 s (of what was not built again), then 2.501 s.
    assert build_times.wall_seconds(jobs) == pytest.approx(0.4 + 3.0 + 2.501, abs=1e-6)
    assert build_times.most_at_once(jobs) == 2
    path.write_text("# ninja log v5\n")
    with pytest.raises(RuntimeError, match="accepted is '# ninja log v7'"):
        build_times.read_log(path)


def test_jobs_one_behind_another_are_one_at_once() -> None:
    assert build_times.most_at_once([Job("a", 0.0, 1.0, 5.0), Job("b", 1.0, 2.0, 5.0)]) == 1
    assert build_times.most_at_once([Job(name, 0.0, 1.0, 5.0) for name in "abc"]) == 3
