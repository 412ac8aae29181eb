"""Commands that are refused, and the file of a small run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from customized_grpo.cli import main as cli

Refused = Callable[..., str]
Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """The one message of a command that ends with `status`, and leaves everything under `tmp_path` as it was."""

    def run(*arguments: object, status: int = 2) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert caught.value.code == status and out.strip() == ""
        assert err.startswith("customized-grpo: error: ") and err.count("error: ") == 1 and "Traceback" not in err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return err

    return run


@pytest.fixture
def settings_file(tmp_path: Path, make_settings: Settings) -> Callable[..., Path]:
    """A YAML file with the settings of a small run, changed."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(make_settings(changes)))
        return path

    return write
