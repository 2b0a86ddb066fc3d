"""`make check` refuses pickles and large binary files."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import COMMAND_DEADLINE_S

SCRIPT = Path(__file__).resolve().parents[2] / "infra/check_files.py"
LIMIT_BYTES = 1_000_000


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def check(repository: Path) -> tuple[int, str]:
    """Run the script as `make check` does; return its exit status and stderr."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(repository)], capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    )
    return done.returncode, done.stderr


def test_small_binary_and_large_text_are_accepted(repository: Path) -> None:
    (repository / "small.bin").write_bytes(bytes(LIMIT_BYTES))
    (repository / "large.txt").write_text("a" * (LIMIT_BYTES + 1))
    assert check(repository) == (0, "")


def test_large_binary_is_refused_with_size_limit_and_remedy(repository: Path) -> None:
    (repository / "large.bin").write_bytes(bytes(LIMIT_BYTES + 1))
    status, error = check(repository)
    assert status == 1
    assert "large.bin" in error
    assert "1,000,001" in error
    assert "1,000,000" in error
    assert "ALLOWED" in error


@pytest.mark.parametrize("name", ["st.pkl", "folder/ST.PKL", "model.pickle"])
def test_pickle_of_any_size_is_refused(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_bytes(b"")
    status, error = check(repository)
    assert status == 1
    assert name in error


def test_tracked_pickle_is_refused_although_ignored(repository: Path) -> None:
    (repository / ".gitignore").write_text("*.pkl\n")
    (repository / "st.pkl").write_bytes(b"")
    assert check(repository) == (0, "")
    subprocess.run(["git", "-C", str(repository), "add", "--force", "st.pkl"], check=True)
    assert check(repository)[0] == 1


def test_named_sample_may_exceed_the_limit(repository: Path) -> None:
    sample = repository / "pipelines/sample/fashion-mnist-sample.zip"
    sample.parent.mkdir(parents=True)
    sample.write_bytes(bytes(LIMIT_BYTES + 1))
    assert check(repository) == (0, "")


def test_file_deleted_but_still_in_the_index_is_skipped(repository: Path) -> None:
    (repository / "gone.bin").write_bytes(bytes(LIMIT_BYTES + 1))
    subprocess.run(["git", "-C", str(repository), "add", "gone.bin"], check=True)
    (repository / "gone.bin").unlink()
    assert check(repository) == (0, "")
