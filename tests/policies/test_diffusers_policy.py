"""What holds of every diffusers policy: one velocity in rollout and update, LoRA alone learns, adapters in diffusers'
own format, encoders that go once they have done their work."""

import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY, EVERY_FAMILY_OR_FAST
from safetensors import safe_open
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, save_image
from customized_grpo.data.dataset import write_metadata
from customized_grpo.diagnosis.gradients import measure_conflict
from customized_grpo.diagnosis.sensitivity import measure
from customized_grpo.errors import UserError
from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.io.files import StorageError
from customized_grpo.policies.block_offload import repeated_blocks
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.training.ema import EMA
from customized_grpo.training.objectives.grpo import step_transition
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch

Load = Callable[..., DiffusersPolicy]
Picture = Callable[..., Tensor]
KINDS = tuple(PIPELINES)


class Brightness(Reward):
    """A reward of a hundred distinct values or so, without a network."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        values = self.sign * images.mean((-3, -2, -1))
        return Scores(values, torch.ones_like(values, dtype=torch.bool))


@pytest.fixture
def dataset(tmp_path: Path, picture: Picture) -> SubjectDataset:
    """Two samples, of one reference each, in two shapes."""
    folder = tmp_path / "data"
    samples = []
    for number, (height, width) in enumerate([(64, 64), (48, 80)]):
        save_image(picture(height, width, number), folder / f"{number}.png")
        samples.append(Sample(f"s{number}", f"a toy number {number} in the snow", (folder / f"{number}.png",)))
    write_metadata(folder, samples)
    return SubjectDataset.open(folder)


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "policy": {"kind": "flux1-kontext"},
        "rewards": {
            "prompt": {"kind": "clip_t", "schedule": "early"}, "identity": {"kind": "clip_i", "schedule": "late"},
        },
        "rollout": {
            "prompts_per_iteration": 2, "group_size": 4, "num_steps": 4, "shift": 3.0, "sde": "dance", "eta": 0.4,
            "subset": {"timestep_fraction": 1.0}, "micro_batch": 4,
        },
        "optimizer": {"learning_rate": 1e-3, "num_minibatches": 1, "micro_batch": 4},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, field = name.partition("__")
        tree[section][field] = value
    return Config.model_validate(tree)


@EVERY_FAMILY
def test_references_of_any_size_and_number(kind: str, load: Load, picture: Picture) -> None:
    policy = load(kind)
    most = min(2, PIPELINES[kind].max_references)
    rows = [[picture(50, 70)], [picture(100, 40, k) for k in range(most)], [picture(30, 30)]]
    prepared = [[policy.prepare_reference(image, len(row)) for image in row] for row in rows]
    assert all(side % 16 == 0 for row in prepared for image in row for side in image.shape[1:])
    prompts = ["a cat", "a dog in the snow", "a cat"]
    condition = policy.encode(prompts, prepared)
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.5, 0.2])
    with torch.no_grad():
        together = policy.velocity(latents, sigma, condition)
        # Each alone, and in another order, is the same.
        for order in ([0], [1], [2], [2, 0, 1]):
            index = torch.tensor(order)
            apart = policy.velocity(latents[index], sigma[index], condition.take(index))
            assert torch.allclose(apart, together[index], atol=1e-5)
    assert together.shape == latents.shape and together.dtype == torch.float32
    assert not torch.allclose(together[0], together[2], atol=1e-3)
    images = policy.decode(latents)
    assert images.shape == (3, 3, 64, 96) and images.min() >= 0 and images.max() <= 1


@EVERY_FAMILY
def test_the_reference_and_the_prompt_matter(kind: str, load: Load, picture: Picture) -> None:
    policy = load(kind)
    one, other = (policy.prepare_reference(picture(64, 64, seed), 1) for seed in (0, 1))
    condition = policy.encode(["a cat", "a cat", "a dog"], [[one], [other], [one]])
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    with torch.no_grad():
        first, reference, prompt = policy.velocity(latents, torch.full((3,), 0.7), condition)
    assert (first - reference).abs().max() > 1e-3
    assert (first - prompt).abs().max() > 1e-4


@EVERY_FAMILY_OR_FAST
def test_an_iteration_trains_the_lora_alone_and_towards_what_is_better(
    kind: str, load: Load, dataset: SubjectDataset, perturb: Callable[..., None]
) -> None:
    policy = load(kind)
    perturb(policy)
    settings = config()
    trainer = Trainer(settings, policy, {"prompt": Brightness(), "identity": Brightness()}, dataset)
    frozen = {name: p.clone() for name, p in policy._transformer.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for _, p in policy.trainable_parameters()]
    assert {name for name, _ in policy.trainable_parameters()} == {
        name for name, _ in policy._transformer.named_parameters() if "lora_" in name
    }

    batch = trainer.batch(trainer.samples(0))
    captured: dict[str, Any] = {}
    optimize = trainer.optimize

    def spy(rollout: Any, advantages: Tensor, *rest: Any) -> Any:
        captured.update(rollout=rollout, advantages=advantages)
        return optimize(rollout, advantages, *rest)

    trainer.optimize = spy  # type: ignore[method-assign]
    metrics = trainer.train_step()
    assert metrics["first_ratio/min"] == pytest.approx(1, abs=1e-5)
    assert metrics["first_ratio/max"] == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(p, frozen[n]) for n, p in policy._transformer.named_parameters() if n in frozen)
    assert any(not torch.equal(p, old) for (_, p), old in zip(policy.trainable_parameters(), before, strict=True))

    rollout = captured["rollout"]
    advantages = captured["advantages"].flatten(0, 1).T
    steps, rows = torch.cartesian_prod(torch.arange(len(rollout.plan.trained)), torch.arange(8)).unbind(1)
    with torch.no_grad():
        transition = step_transition(policy, rollout, settings.rollout, steps, rows)
        now = transition.log_prob(rollout.next_states[steps, rows])
    gain = (now - rollout.log_probs[steps, rows]) * advantages[steps, rows].sign()
    assert gain.mean() > 0
    assert len(batch.prompts) == 2


@EVERY_FAMILY
def test_rollout_and_update_compute_the_same_velocity_bitwise(
    kind: str, load: Load, picture: Picture, perturb: Callable[..., None]
) -> None:
    policy = load(kind)
    perturb(policy)
    reference = policy.prepare_reference(picture(64, 64), 1)
    condition = policy.encode(["a cat"], [[reference]]).take(torch.zeros(4, dtype=torch.long))
    latents, sigma = torch.randn(4, *policy.latent_shape), torch.full((4,), 0.6)
    with torch.no_grad():
        in_rollout = policy.velocity(latents, sigma, condition)
    in_update = policy.velocity(latents, sigma, condition)
    assert in_update.requires_grad
    assert torch.equal(in_rollout, in_update)


@pytest.mark.parametrize("kind", ["flux1-kontext", "qwen-image-edit-plus"])
def test_checkpointing_changes_no_gradient(
    kind: str, load: Load, picture: Picture, perturb: Callable[..., None]
) -> None:
    gradients = []
    for settings in ({}, {"keep_every": 2}, {"gradient_checkpointing": False}):
        policy = load(kind, **settings)
        perturb(policy)
        reference = policy.prepare_reference(picture(64, 64), 1)
        latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        condition = policy.encode(["a cat"], [[reference]])
        policy.velocity(latents, torch.tensor([0.5]), condition).square().mean().backward()
        # What only the last block's text stream reads has no gradient.
        found = [p.grad for _, p in policy.trainable_parameters() if p.grad is not None]
        assert len(found) > len(list(policy.trainable_parameters())) / 2
        gradients.append(found)
    for one, *others in zip(*gradients, strict=True):
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for other in others)


@pytest.mark.parametrize(("settings", "runs"), [({}, [2] * 4), ({"keep_every": 2}, [1, 2] * 2)])
def test_kept_blocks_are_not_computed_again(
    settings: dict[str, Any], runs: list[int], load: Load, picture: Picture
) -> None:
    policy = load("flux1-kontext", **settings)
    reference = policy.prepare_reference(picture(64, 64), 1)
    condition = policy.encode(["a cat"], [[reference]])
    blocks = repeated_blocks(policy._transformer)
    counts = dict.fromkeys(blocks, 0)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: counts.update({module: counts[module] + 1}))
    policy.velocity(torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), condition).sum().backward()
    assert list(counts.values()) == runs


@pytest.mark.slow
def test_compiled_blocks_are_not_given_up(load: Load, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, but not translated, which takes minutes. At its limit torch warns, and runs uncompiled; here it fails."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, policy = load("flux1-kontext"), load("flux1-kontext", compile=True)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for count, size in ((3, (64, 64)), (2, (48, 80)), (1, (64, 64))):
            condition = policy.encode(["a cat"], [[picture(*size)]]).take(torch.zeros(count, dtype=torch.long))
            latents, sigma = torch.randn(count, *policy.latent_shape), torch.full((count,), 0.6)
            velocity = policy.velocity(latents, sigma, condition)
            velocity.mean().backward()
            with torch.no_grad():
                expected = plain.velocity(latents, sigma, condition)
                assert torch.equal(policy.velocity(latents, sigma, condition), velocity)
            assert torch.allclose(velocity, expected, atol=1e-5)


@EVERY_FAMILY_OR_FAST
def test_a_plain_pipeline_takes_the_adapter(
    kind: str,
    load: Load,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    picture: Picture,
    perturb: Callable[..., None],
) -> None:
    """`pipe.load_lora_weights(run)` on a plain pipeline gives our tuned velocity, and ours loads what theirs saves."""
    policy, family = load(kind), PIPELINES[kind]
    perturb(policy)
    policy.save_adapter(tmp_path / "run")
    reference = policy.prepare_reference(picture(64, 64), 1)
    condition = policy.encode(["a cat"], [[reference]])
    latents, sigma = torch.randn(1, *policy.latent_shape), torch.tensor([0.6])

    plain = family.pipeline.from_pretrained(tiny_models[kind], **family.load_components(str(tiny_models[kind])))
    plain.load_lora_weights(tmp_path / "run")
    (batch,) = condition.batches(torch.device("cpu"))
    with torch.no_grad():
        tuned = policy.velocity(latents, sigma, condition)
        with policy.base_weights():
            base = policy.velocity(latents, sigma, condition)
        theirs = family.velocity(plain.transformer, latents, sigma, batch, policy.size, family.guidance)
    assert (tuned - base).abs().max() > 1e-3
    assert torch.allclose(theirs, tuned, atol=1e-5)

    # Theirs, saved by diffusers, in a policy of another seed.
    plain.transformer.save_lora_adapter(tmp_path / "theirs", adapter_name="default_0")
    with safe_open(tmp_path / "run" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "lora_adapter_metadata" in file.metadata()
    fresh = load(kind, seed=5)
    fresh.load_adapter(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.allclose(fresh.velocity(latents, sigma, condition), tuned, atol=1e-5)


def test_what_is_written_may_be_read_by_whom_the_umask_allows(load: Load, tmp_path: Path, picture: Picture) -> None:
    before = os.umask(0o027)
    try:
        policy = load("flux1-kontext")
        policy.save_adapter(tmp_path / "run")
        policy.encode(["a cat"], [[policy.prepare_reference(picture(64, 64), 1)]])
    finally:
        os.umask(before)
    files = [*tmp_path.glob("run/*.safetensors"), *tmp_path.glob("conditions/*/*.safetensors")]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_plain_pipeline_takes_averaged_weights(
    load: Load, tiny_models: dict[str, Path], tmp_path: Path, picture: Picture, perturb: Callable[..., None]
) -> None:
    """What a run leaves in its folder `ema` is an adapter as the one beside it."""
    policy, family = load("flux1-kontext"), PIPELINES["flux1-kontext"]
    average = EMA(policy.trainable_parameters(), 0.5)
    perturb(policy)
    average.update(10)
    condition = policy.encode(["a cat"], [[policy.prepare_reference(picture(64, 64), 1)]])
    latents, sigma = torch.randn(1, *policy.latent_shape), torch.tensor([0.6])
    with torch.no_grad(), average.swapped():
        policy.save_adapter(tmp_path / "ema")
        averaged = policy.velocity(latents, sigma, condition)
    plain = family.pipeline.from_pretrained(tiny_models["flux1-kontext"])
    plain.load_lora_weights(tmp_path / "ema")
    fresh = load("flux1-kontext", seed=5)
    fresh.load_adapter(tmp_path / "ema")
    (batch,) = condition.batches(torch.device("cpu"))
    with torch.no_grad():
        theirs = family.velocity(plain.transformer, latents, sigma, batch, policy.size, family.guidance)
        assert torch.allclose(theirs, averaged, atol=1e-5)
        assert torch.allclose(fresh.velocity(latents, sigma, condition), averaged, atol=1e-5)
        assert (policy.velocity(latents, sigma, condition) - averaged).abs().max() > 1e-3


def test_encoding_ahead_lets_the_encoders_go(load: Load, picture: Picture, tmp_path: Path) -> None:
    policy, again = load("flux1-kontext"), load("flux1-kontext")
    pictures = [policy.prepare_reference(picture(64, 64, seed), 1) for seed in range(2)]
    heard: list[int] = []
    gone = [weakref.ref(part) for part in (policy._pipe.text_encoder, policy._pipe.text_encoder_2)]
    gone.append(weakref.ref(policy._pipe.vae.encoder))
    save_image(picture(64, 64), tmp_path / "a.png")
    rows = [Sample(prompt, prompt, (tmp_path / "a.png",)) for prompt in ("a cat", "a dog")]
    policy.precompute(rows, lambda number: [pictures[number]], [0, 1], heard.append)
    assert heard == [1, 2]
    assert [part() for part in gone] == [None] * 3
    # From the cache, and the same as encoded anew.
    kept = policy.encode(["a dog"], [[pictures[1]]]).rows[0]
    fresh = PIPELINES["flux1-kontext"].encode(again._pipe, "a dog", [pictures[1]], torch.device("cpu"), guided=True)
    assert kept.sizes == fresh.sizes
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in fresh.tensors.items())
    assert policy.decode(torch.randn(1, *policy.latent_shape)).shape == (1, 3, 64, 96)
    shutil.rmtree(tmp_path / "conditions")
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.cache: a prompt that was encoded before training is not there"
    ):
        policy.encode(["a cat"], [[pictures[0]]])


def test_offload_keeps_the_encoders(load: Load, picture: Picture, tmp_path: Path) -> None:
    policy = load("flux1-kontext", text_encoders="cpu")
    reference = policy.prepare_reference(picture(64, 64), 1)
    save_image(picture(64, 64), tmp_path / "a.png")
    policy.precompute([Sample("s", "a cat", (tmp_path / "a.png",))], lambda n: [reference], [0], lambda done: None)
    assert policy.encode(["a bird"], [[reference]]).rows


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"prompt": "a dog"}),
        ({}, {"picture": 1}),
        ({}, {"side": 48}),
        ({}, {"precision": "bf16"}),
        ({}, {"tokenizer": "touched"}),
        ({"kind": "qwen-image-edit-plus"}, {"kind": "qwen-image-edit-plus", "guidance_scale": 1.0}),
    ],
)
def test_the_cache_tells_what_a_row_depends_on(
    one: dict[str, Any], other: dict[str, Any], load: Load, picture: Picture, tiny_models: dict[str, Path]
) -> None:
    def paths(settings: dict[str, Any]) -> set[Path]:
        more = {key: settings[key] for key in ("precision", "guidance_scale") if key in settings}
        policy = load(settings.get("kind", "flux1-kontext"), reference_side=settings.get("side", 64), **more)
        reference = policy.prepare_reference(picture(64, 64, settings.get("picture", 0)), 1)
        return set(policy._cache.paths(settings.get("prompt", "a cat"), [reference]).values())

    first = paths(one)
    assert paths(one) == first
    if "tokenizer" in other:
        os.utime(tiny_models["flux1-kontext"] / "tokenizer_2" / "tokenizer.json")
    assert paths(other) != first


@EVERY_FAMILY_OR_FAST
def test_bf16_keeps_the_first_ratio(
    kind: str, load: Load, dataset: SubjectDataset, perturb: Callable[..., None]
) -> None:
    """It is 1 in bf16 too, in the recipes' shape: several prompts, and updates whose micro-batches mix them."""
    policy = load(kind, precision="bf16")
    perturb(policy)
    settings = config(
        rollout__num_steps=3, rollout__micro_batch=2, optimizer__micro_batch=2, optimizer__num_minibatches=2
    )
    rewards = {"prompt": Brightness(), "identity": Brightness(-1.0)}
    metrics = Trainer(settings, policy, rewards, dataset).train_step()
    assert metrics["first_ratio/min"] == metrics["first_ratio/max"] == 1
    assert all(p.dtype == torch.float32 for _, p in policy.trainable_parameters())


def test_kl_to_the_untuned_generator(load: Load, dataset: SubjectDataset, perturb: Callable[..., None]) -> None:
    policy = load("flux1-kontext")
    perturb(policy)
    tree = config().model_dump()
    tree["objective"]["kl_weight"] = 1.0
    trainer = Trainer(Config.model_validate(tree), policy, {"prompt": Brightness(), "identity": Brightness()}, dataset)
    metrics = trainer.train_step()
    assert metrics["kl"] > 1e-6 and metrics["grad_norm"] > 0
    assert all(parameter.requires_grad for _, parameter in policy.trainable_parameters())


def test_both_premises_are_measured(load: Load, dataset: SubjectDataset, perturb: Callable[..., None]) -> None:
    """`diagnose` needs nothing but the two protocols."""
    policy = load("flux1-kontext")
    perturb(policy)
    rewards, settings = {"prompt": Brightness(), "identity": Brightness(-1.0)}, config()
    conflict = measure_conflict(settings, policy, rewards, dataset, batches=2)
    assert conflict.whole_cosines == pytest.approx([-1, -1], abs=1e-3)
    sensitivity = measure(settings, policy, rewards, dataset, prompts=2, group_size=2)
    assert sensitivity.variances.shape == (2, 3, 2) and (sensitivity.variances > 0).all()


def test_ode_samples_do_not_depend_on_micro_batches(load: Load, picture: Picture) -> None:
    policy = load("flux1-kontext")
    references = [[policy.prepare_reference(picture(h, w), 1)] for h, w in [(64, 64), (48, 80), (64, 64)]]
    condition = policy.encode(["a cat", "a dog", "a bird"], references)
    noise = torch.randn(3, *policy.latent_shape)
    images = [sample_ode(policy, condition, noise, policy.sigmas(3, 3.0), micro_batch) for micro_batch in (1, 3)]
    assert torch.allclose(*images, atol=1e-5)


def test_a_full_disk_under_the_cache(
    load: Load, picture: Picture, tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    policy = load("flux1-kontext")
    reference = policy.prepare_reference(picture(64, 64), 1)
    with files_up_to(1000), pytest.raises(StorageError, match=f"{tmp_path / 'conditions'}: no space .* MB are needed"):
        policy.encode(["a cat"], [[reference]])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert policy.encode(["a cat"], [[reference]]).rows
    with files_up_to(1000), pytest.raises(StorageError, match=f"{tmp_path / 'run'}: no space to write"):
        policy.save_adapter(tmp_path / "run")
