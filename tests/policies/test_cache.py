"""The cache of encoded prompts and references: what is encoded, what rows share, how large it gets, and how it goes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY_OR_FAST
from torch import Tensor

from customized_grpo.cli.main import main
from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, batch_indices, save_image, write_metadata
from customized_grpo.data.images import image_size
from customized_grpo.diagnosis.command import diagnose
from customized_grpo.errors import UserError
from customized_grpo.factory.data import encode_ahead, read_samples
from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.factory.rewards import RewardLoader
from customized_grpo.io.files import LOCK
from customized_grpo.policies.cache_folder import Hold, clear, list_files
from customized_grpo.policies.conditions import check_room
from customized_grpo.policies.diffusers_policy import DiffusersPolicy, bytes_of_rows, plan_row
from customized_grpo.tracking.console import Display
from customized_grpo.training.run import _first_iteration, evaluate_run, train

Load = Callable[..., DiffusersPolicy]
Picture = Callable[..., Tensor]


@pytest.fixture
def data(tmp_path: Path, picture: Picture) -> SubjectDataset:
    """Twelve samples of three pictures and six prompts."""
    folder = tmp_path / "data"
    for number, (height, width) in enumerate([(64, 64), (48, 80), (64, 64)]):
        save_image(picture(height, width, number), folder / f"{number}.png")
    samples = [Sample(f"s{n}", f"a toy in scene {n % 6}", (folder / f"{n % 3}.png",)) for n in range(12)]
    write_metadata(folder, samples)
    return SubjectDataset.open(folder)


def config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "iterations": 3, "policy": {"kind": "flux1-kontext"},
        "rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "clip_i"}},
        "rollout": {"prompts_per_iteration": 2},
        "evaluation": {"num_samples": 1, "gallery": 2, "num_test_samples": 3},
    }  # fmt: skip
    return Config.model_validate({name: tree.get(name, {}) | value for name, value in sections.items()} | {
        name: value for name, value in tree.items() if name not in sections
    })  # fmt: skip


def encode(policy: DiffusersPolicy, data: SubjectDataset, samples: Sequence[Sample] | None = None) -> None:
    with Display.silent().stages() as stages:
        encode_ahead(policy, {data: data.samples if samples is None else samples}, stages)


def test_a_run_encodes_what_it_reads(data: SubjectDataset) -> None:
    settings = config()
    drawn = {index for k in range(3) for index in batch_indices(len(data), 2, settings.seed, k)}
    (samples,) = read_samples(settings, {"path": data}).values()
    assert list(samples) == [data[index] for index in sorted(drawn | {0, 1})] and len(samples) < len(data)
    # Going on after two iterations, only those of the third are left, and the validation's.
    (rest,) = read_samples(settings, {"path": data}, first=2).values()
    assert {each.id for each in rest} == {data[i].id for i in {0, 1, *batch_indices(len(data), 2, settings.seed, 2)}}
    other, test = (SubjectDataset(data.folder, data.samples, 10**6, 0) for _ in range(2))
    used = read_samples(settings, {"path": data, "validation": other, "test": test})
    assert [len(used[each]) for each in (data, other, test)] == [len(drawn), 2, 3]
    long = read_samples(settings.model_copy(update={"iterations": 100}), {"path": data})
    assert len(long[data]) == len(data)


@EVERY_FAMILY_OR_FAST
def test_what_rows_share_is_kept_and_read_once(kind: str, load: Load, data: SubjectDataset, tmp_path: Path) -> None:
    policy = load(kind)
    encode(policy, data)
    folder = tmp_path / "conditions"
    names = {"flux1-kontext": 6 + 3, "uno": 6 + 3, "flux2": 6 + 3, "flux2-klein": 1 + 6 + 3}
    # Six pairs of prompt and picture are distinct: a Qwen reads the pictures beside the prompt.
    assert len(list_files(folder)) == names.get(kind, 6 + 3)
    references = [data.references([data[n]], policy.prepare_reference)[0] for n in (0, 6, 3)]
    same, again, other = policy.encode([data[n].prompt for n in (0, 6, 3)], references).rows
    assert all(same.tensors[name] is again.tensors[name] for name in same.tensors)
    assert same.tensors["reference"] is other.tensors["reference"]
    assert same.tensors["text"] is not other.tensors["text"]
    if policy.guided:
        assert same.tensors["negative"] is other.tensors["negative"]
    fresh = load(kind)
    for row, sample, pictures in ((same, data[0], references[0]), (other, data[3], references[2])):
        whole = PIPELINES[kind].encode(fresh._pipe, sample.prompt, pictures, torch.device("cpu"), guided=fresh.guided)
        assert row.tensors.keys() == whole.tensors.keys() and row.sizes == whole.sizes
        assert all(torch.equal(row.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_negative_prompt_is_encoded_once(load: Load, data: SubjectDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts = load("flux2-klein"), []
    before = policy._pipe.encode_prompt

    def spy(prompt: list[str], **settings: Any) -> Any:
        prompts.extend(prompt)
        return before(prompt, **settings)

    monkeypatch.setattr(policy._pipe, "encode_prompt", spy)
    encode(policy, data)
    assert prompts.count("") == 1 and set(prompts) == {"", *(sample.prompt for sample in data)}


@EVERY_FAMILY_OR_FAST
def test_the_bytes_of_rows_are_known_before(kind: str, load: Load, data: SubjectDataset, tmp_path: Path) -> None:
    """Exactly, but for the header of each file; a Qwen's texts are as long as they are."""
    policy = load(kind)
    planned = [plan_row(PIPELINES[kind], sample, 64) for sample in data]
    told = bytes_of_rows(PIPELINES[kind], policy._transformer.config, torch.float32, planned, guided=policy.guided)
    encode(policy, data)
    files = list_files(tmp_path / "conditions")
    taken = sum(each.bytes for each in files)
    if kind == "qwen-image-edit-plus":
        assert told > 0
    else:
        assert 0 <= taken - told <= 256 * len(files)


def test_a_limit_that_a_run_exceeds(load: Load, data: SubjectDataset, tmp_path: Path) -> None:
    policy = load("flux1-kontext", cache_limit=1e-5)
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.cache_limit: .* take about [\d.]+ MB in .*, more than the limit of"
    ):
        encode(policy, data)
    assert list_files(tmp_path / "conditions") == []


def test_the_least_recently_used_goes_first_and_nothing_that_is_needed(
    load: Load, data: SubjectDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "conditions"
    earlier = load("flux1-kontext")
    encode(earlier, data, data.samples[:4])
    earlier._cache._hold.close()  # type: ignore[union-attr]
    files = list_files(folder)
    size = sum(each.bytes for each in files)
    needed = set(load("flux1-kontext")._cache.paths(data[0].prompt, references_of(load, data, 0)).values())
    aged = sorted((each.path for each in files), key=lambda path: path not in needed)  # what is needed is the oldest
    for age, path in enumerate(aged):
        os.utime(path, (1000 + age, 1000 + age))
    limited = load("flux1-kontext", cache_limit=1.02 * size / 1e9)
    encode(limited, data, [data[0], data[5]])
    left = list_files(folder)
    assert sum(each.bytes for each in left) <= 1.02 * size
    assert needed <= {each.path for each in left}
    gone = {each.path for each in files} - {each.path for each in left}
    others = [path for path in aged if path not in needed]
    assert 0 < len(gone) < len(others) and gone == set(others[: len(gone)])
    assert limited.encode([data[0].prompt], [references_of(load, data, 0)]).rows


def references_of(load: Load, data: SubjectDataset, number: int) -> list[Tensor]:
    return data.references([data[number]], load("flux1-kontext").prepare_reference)[0]


def test_a_disk_without_room_is_told_before() -> None:
    with pytest.raises(UserError, match=r"policy\.pipeline\.cache: .* take about 5 GB in there, where 3 GB are free"):
        check_room(Path("there"), 5 * 10**9, 10**9, 3 * 10**9, None)
    check_room(Path("there"), 4 * 10**9, 10**9, 3 * 10**9, 4e9)


def test_nothing_goes_from_under_a_run(load: Load, data: SubjectDataset, tmp_path: Path) -> None:
    folder = tmp_path / "conditions"
    running = load("flux1-kontext")
    encode(running, data, data.samples[:4])
    count = len(list_files(folder))
    with pytest.raises(UserError, match=r"policy\.pipeline\.cache: .* is in use by a run; wait"):
        clear(folder)
    size = sum(each.bytes for each in list_files(folder))
    with pytest.raises(UserError, match="is in use by a run"):
        encode(load("flux1-kontext", cache_limit=1.02 * size / 1e9), data, [data[5]])
    encode(load("flux1-kontext"), data, data.samples[:4])  # beside it
    assert len(list_files(folder)) == count
    del running


def test_the_command_tells_and_clears(
    load: Load, data: SubjectDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "conditions"
    policy = load("flux1-kontext")
    encode(policy, data, data.samples[:1])
    (folder / "notes.txt").write_text("mine")
    old = folder / "ab" / f"{'ab' * 32}.safetensors"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"of an earlier version")
    main(["cache", "--folder", str(folder)])
    assert capsys.readouterr().out.startswith(f"{folder}: 3 files, 0.")
    with pytest.raises(SystemExit):
        main(["cache", "--folder", str(folder), "--clear"])
    assert "is in use by a run" in capsys.readouterr().err
    policy._cache._hold.close()  # type: ignore[union-attr]
    main(["cache", "--folder", str(folder), "--clear"])
    assert f"{folder}: 3 files removed" in capsys.readouterr().out
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"notes.txt", LOCK}
    with pytest.raises(SystemExit):
        main(["cache", "--folder", str(tmp_path / "none")])
    assert "--folder: there is no folder" in capsys.readouterr().err


def test_a_cache_of_another_user_is_read(
    load: Load, data: SubjectDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(load("flux1-kontext"), data, data.samples[:2])

    def refuse(path: Path, *arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    encode(load("flux1-kontext"), data, data.samples[:2])
    with pytest.raises(UserError, match="is in use by a run"):
        clear(tmp_path / "conditions")
    (tmp_path / "conditions" / LOCK).unlink()
    Hold(tmp_path / "conditions").close()  # there is none, and none can be made


def test_other_processes_of_a_machine_only_check(
    load: Load, data: SubjectDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    policy = load("flux1-kontext", cache_limit=1e-5)
    with pytest.raises(UserError, match=r"policy\.pipeline\.cache_limit"):
        policy.precompute(data.samples, lambda index: [], [], lambda done: None)
    load("flux1-kontext").precompute(data.samples, lambda index: [], [], lambda done: None)
    assert not (tmp_path / "conditions").exists()


def test_a_hold_is_let_go(tmp_path: Path) -> None:
    one, two = Hold(tmp_path / "a"), Hold(tmp_path / "a")
    with pytest.raises(UserError, match="in use"):
        one.alone()
    two.close()
    one.alone()
    one.close()


def test_the_size_of_a_picture_is_read_from_its_header(tmp_path: Path, picture: Picture) -> None:
    from PIL import Image

    save_image(picture(30, 50), tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (30, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (50, 30)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(UserError, match=r"b\.png: not an image"):
        image_size(tmp_path / "b.png")


def test_a_resumed_run_may_go_on_from_its_oldest_checkpoint(tmp_path: Path) -> None:
    """Newer ones may prove damaged, and are passed over then."""
    for name in ("000020", "000040", ".000060.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert _first_iteration(tmp_path, resume=True, resume_from=None) == 20
    assert _first_iteration(tmp_path, resume=False, resume_from=None) == 0
    assert _first_iteration(tmp_path / "none", resume=True, resume_from=None) == 0


def test_a_run_and_a_diagnosis_read_what_they_encoded(
    data: SubjectDataset, tiny_models: dict[str, Path], tmp_path: Path, display: Display, reward_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Were a sample read that was not encoded, the encoders would be gone."""
    rewards = {
        "prompt": reward_of(lambda images: images.mean((-3, -2, -1))),
        "identity": reward_of(lambda images: images.std((-3, -2, -1))),
    }
    monkeypatch.setattr("customized_grpo.training.run.build_rewards", lambda config, loader: rewards)
    monkeypatch.setattr(RewardLoader, "load", lambda self, field, config: rewards[field.removeprefix("rewards.")])
    monkeypatch.setattr("customized_grpo.training.resume.fingerprints", lambda config: {})
    policy = {
        "kind": "flux1-kontext", "lora_rank": 2, "lora_alpha": 2, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    pipeline = {"model": str(tiny_models["flux1-kontext"]), "height": 32, "width": 32, "reference_side": 32}
    rollout = {"prompts_per_iteration": 2, "group_size": 2, "num_steps": 3, "sde": "cps"}

    def settings(iterations: int, name: str) -> Config:
        return config(
            policy=policy | {"pipeline": pipeline | {"cache": str(tmp_path / name)}},
            rollout=rollout,
            data={"path": str(data.folder)},
        ).model_copy(update={"iterations": iterations, "output": tmp_path / "run", "threads": 1})

    train(settings(1, "one"), display)
    train(settings(2, "two"), display, resume=True)
    prompts = {data[i].prompt for i in {0, 1, *batch_indices(12, 2, 0, 1), *batch_indices(12, 2, 0, 0)}}
    pictures = {data[i].references for i in {0, 1, *batch_indices(12, 2, 0, 1), *batch_indices(12, 2, 0, 0)}}
    whole = len(prompts) + len(pictures)
    assert len(list_files(tmp_path / "one")) < whole < 6 + 3
    assert len(list_files(tmp_path / "two")) <= whole
    evaluate_run(tmp_path / "run", None, 2, display)
    diagnose(settings(1, "three"), tmp_path / "out", display, prompts=2, group_size=2, batches=2)
    assert 0 < len(list_files(tmp_path / "three")) < 6 + 3
