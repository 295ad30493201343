from __future__ import annotations

import os

import pytest

from wan_patches.diagnostics.preflight import check_file, check_folder


def test_checking_a_writable_file_does_not_change_it(tmp_path):
    old, link = tmp_path / "old.json", tmp_path / "link.json"
    old.write_text("kept")
    os.utime(old, (1, 1))
    link.symlink_to(tmp_path / "new.json")
    for path in (old, tmp_path / "new.json", str(tmp_path / "new.html"), link):
        check_file(path)
    assert old.read_text() == "kept"
    assert old.stat().st_mtime == 1
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "link.json"}
    assert link.is_symlink()
    check_file("/dev/null")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/x.html", "there is no folder .*nowhere for x.html: create it first"),
        (".", "is a folder: give a file name"),
        ("file/x.html", "there is no folder"),
        ("/proc/x.html", "/proc/x.html cannot be written: "),
        ("link", "link cannot be written: "),
    ],
)
def test_errors_of_unwritable_files(path, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere/x.html")
    with pytest.raises(OSError, match=message):
        check_file(tmp_path / path)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_file(tmp_path / "pipe")


def test_checking_a_writable_folder_does_not_change_it(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"), [("file/inner", "file is not a folder"), ("/proc/x", "/proc/x is not writable: ")]
)
def test_errors_of_unwritable_folders(path, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=message):
        check_folder(tmp_path / path)
