"""A kind that replaces another leaves none of its settings behind, in whatever order files and options come."""

from collections.abc import Callable
from pathlib import Path

import pytest

from customized_grpo.cli.main import build_parser
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError

Merged = Callable[..., Config]
SEGMENTED = "{kind: dino, schedule: late, dino: {reference: segmented, model: there}, local: {micro_batch: 4}}"


@pytest.fixture
def merged(tmp_path: Path) -> Merged:
    """What `train` makes of files (texts of rewards) and options, after a file with a DINO reward."""

    def merge(*sources: str) -> Config:
        arguments = ["train"]
        for number, source in enumerate((f"identity: {SEGMENTED}", *sources)):
            if source.startswith("--"):
                arguments.append(source)
            else:
                path = tmp_path / f"{number}.yaml"
                path.write_text(f"rewards: {{prompt: {{kind: clip_t, schedule: early}}, {source}}}\n")
                arguments += ["--config", str(path)]
        parser = build_parser()
        _, command = parser.command_of(arguments)
        options = parser.parse_args(command.resolve_configs(arguments))["train"].as_dict()
        fields = {name: value for name, value in options.items() if name in Config.model_fields}
        return Config.model_validate(fields | {"policy": {"kind": "uno"}})

    return merge


def test_nothing_is_reset_for_one_kind(merged: Merged) -> None:
    identity = merged("--rewards.identity.kind=dino", "--rewards.identity.dino.background=0.5").rewards["identity"]
    assert (identity.dino.reference, identity.dino.model, identity.dino.background) == ("segmented", "there", 0.5)


@pytest.mark.parametrize("how", ["--rewards.identity.kind=clip_i", "identity: {kind: clip_i}"])
def test_the_settings_of_a_replaced_kind_go(merged: Merged, how: str) -> None:
    identity = merged(how, "--rewards.identity.clip_i.background=1.0").rewards["identity"]
    assert identity.kind == "clip_i" and identity.dino.model is None and identity.dino.reference == "whole"
    assert identity.local.micro_batch == 4, "of both kinds"
    assert identity.schedule == "late"


def test_where_the_model_runs_goes_too_if_there_is_none(merged: Merged) -> None:
    identity = merged("identity: {kind: remote, remote: {url: 'http://there:1'}}").rewards["identity"]
    assert identity.kind == "remote" and identity.local.micro_batch == 32


def test_what_is_set_after_the_change_is_an_error(merged: Merged) -> None:
    for wrong in ("--rewards.identity.dino.model=mine", "identity: {kind: clip_i, dino: {model: mine}}"):
        with pytest.raises((UserError, ValueError), match=r"dino.model: only for kind=dino"):
            merged("--rewards.identity.kind=clip_i", wrong)


def test_a_kind_may_come_back(merged: Merged) -> None:
    identity = merged("--rewards.identity.kind=clip_i", "--rewards.identity.kind=dino").rewards["identity"]
    assert identity.kind == "dino" and identity.dino.model is None
