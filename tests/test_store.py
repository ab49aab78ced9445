"""Folders are written whole or not at all, whatever goes wrong in between; one process works on a folder at a time."""

import os
import subprocess
import sys

import pytest

from absorber import MemoryFileError, SessionBusyError
from absorber.store import locked, read_json, recover, whole_folder, write_json

MARKER = "ours.json"


class Crash(BaseException):
    """As if the process had been killed at this place."""


def write(folder, version):
    with whole_folder(folder, marker=MARKER) as scratch:
        write_json(scratch / MARKER, {"version": version})
        (scratch / "deep").mkdir()
        (scratch / "deep" / version).touch()


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def is_version(folder, version):
    return read_json(folder / MARKER)["version"] == version and content(folder) == ["deep", f"deep/{version}", MARKER]


def test_a_new_folder_and_its_replacement(tmp_path):
    folder = tmp_path / "new" / "memory"
    for version in ("first", "second"):
        write(folder, version)
        assert is_version(folder, version)
        assert os.listdir(folder.parent) == ["memory"]
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, error, existed):
    folder = tmp_path / "memory"
    if existed:
        write(folder, "first")

    def fail(scratch):
        write_json(scratch / MARKER, {"version": "second"})
        raise error

    with pytest.raises(error), whole_folder(folder, marker=MARKER) as scratch:
        fail(scratch)
    assert os.listdir(tmp_path) == (["memory"] if existed else [])
    if existed:
        assert is_version(folder, "first")


def test_a_full_disk_is_told(tmp_path):
    write(tmp_path / "memory", "first")
    with (
        pytest.raises(MemoryFileError, match="No space left on device; nothing there was changed"),
        whole_folder(tmp_path / "memory", marker=MARKER),
    ):
        raise OSError(28, "No space left on device")
    assert is_version(tmp_path / "memory", "first")


@pytest.mark.parametrize("error", [Crash, OSError])
def test_a_crash_between_the_two_renames_is_recovered(tmp_path, monkeypatch, error):
    folder, calls = tmp_path / "memory", []
    write(folder, "first")
    replace = os.replace

    def crashing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise error(5, "broken")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        if error is Crash:  # the process is gone, so nobody tidies up
            patch.setattr("absorber.store.recover", lambda folder: None)
        with pytest.raises((Crash, MemoryFileError)):
            write(folder, "second")
    if error is Crash:
        assert not folder.exists()
        recover(folder)
    assert is_version(folder, "first")
    assert os.listdir(tmp_path) == ["memory"]
    write(folder, "third")
    assert is_version(folder, "third")


def test_a_crash_after_the_renames_keeps_the_new_one(tmp_path):
    folder = tmp_path / "memory"
    write(folder, "second")
    write(tmp_path / ".memory.previous", "first")
    recover(folder)
    assert is_version(folder, "second")
    assert os.listdir(tmp_path) == ["memory"]


def test_what_is_not_ours_is_not_replaced(tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    write(foreign, "empty folders may be taken")
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(MemoryFileError, match=r"photos exists and has no ours.json, so it is not ours to replace"):
        write(other, "first")
    assert content(other) == ["cat.jpg"]
    with pytest.raises(MemoryFileError, match="is a file; choose a folder"):
        write(other / "cat.jpg", "first")
    with pytest.raises(MemoryFileError, match="cannot write to"):
        write(other / "cat.jpg" / "below", "first")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", b"\xff"])
def test_damaged_json_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MemoryFileError, match=r"x\.json is damaged"):
        read_json(path)


def test_missing_json_is_refused(tmp_path):
    with pytest.raises(MemoryFileError, match=r"has no x\.json"):
        read_json(tmp_path / "x.json")


def test_a_lock_keeps_others_out(tmp_path):
    folder = tmp_path / "session"
    attempt = (
        "import sys; from pathlib import Path; from absorber.store import locked\n"
        "with locked(Path(sys.argv[1])): print('in')"
    )
    command = [sys.executable, "-c", attempt, str(folder)]
    with locked(folder):
        with pytest.raises(SessionBusyError, match="another process works on"), locked(folder):
            pass
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "SessionBusyError" in other.stderr
        with locked(tmp_path / "another"):
            pass
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "in\n"
    with pytest.raises(ZeroDivisionError), locked(folder):
        raise ZeroDivisionError
    with locked(folder):
        pass
