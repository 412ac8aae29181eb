"""The launcher of several processes: who is waited for, and for how long."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from customized_grpo.distributed import launch as launcher
from customized_grpo.distributed.launch import launch, saving

PROGRAM = """
import os, signal, sys, time
from pathlib import Path

out, does = Path(sys.argv[1]), sys.argv[2 + int(os.environ["RANK"])]
if does == "fails":
    raise SystemExit(3)
if does == "saves":
    marker = Path(os.environ["CUSTOMIZED_GRPO_SAVING"])
    marker.touch()
    time.sleep(3)
    (out / "saved").touch()
    marker.unlink()
if does == "hangs":
    time.sleep(300)
if does == "listens":
    def heard(number, frame):
        (out / f"heard{os.environ['RANK']}").write_text(signal.Signals(number).name)
        raise SystemExit(128 + number)
    signal.signal(signal.SIGINT, heard)
    (out / f"ready{os.environ['RANK']}").touch()
    time.sleep(300)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of our name that does what its arguments say, a word for each process; yields where it writes."""
    package = tmp_path / "path" / "customized_grpo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(launcher, "PATIENCE", 0.5)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def test_a_process_that_saves_is_not_killed_when_another_fails(program: Path) -> None:
    assert launch([str(program), "saves", "fails"], 2) == 3
    assert (program / "saved").is_file()


def test_a_process_that_hangs_is_killed_when_another_fails(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([str(program), "hangs", "fails"], 2) == 1
    assert "process 0 of 2 was ended by SIGKILL" in capfd.readouterr().err


def test_ctrl_c_to_the_launcher_alone_reaches_every_process(program: Path) -> None:
    def press() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not all((program / f"ready{rank}").is_file() for rank in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert launch([str(program), "listens", "listens"], 2) == 130
    assert {(program / f"heard{rank}").read_text() for rank in (0, 1)} == {"SIGINT"}


def test_without_a_launcher_nothing_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUSTOMIZED_GRPO_SAVING", raising=False)
    with saving():
        pass
    monkeypatch.setenv("CUSTOMIZED_GRPO_SAVING", str(tmp_path / "marker"))
    with saving():
        assert (tmp_path / "marker").is_file()
    assert not (tmp_path / "marker").exists()
