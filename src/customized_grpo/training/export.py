"""`customized-grpo export`: the adapter of a checkpoint, as a finished run leaves it."""

import shutil
from pathlib import Path

import yaml
from torch import Tensor

from customized_grpo.config.policy import PIPELINES, PolicyConfig
from customized_grpo.config.run import Config, flatten
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import save_adapter
from customized_grpo.io.files import check_finite, check_folder, write_whole, writing
from customized_grpo.io.jsonl import last_row
from customized_grpo.policies.lora_files import read_tensors
from customized_grpo.report.card import Exported, write_card
from customized_grpo.training.checkpoint import MANIFEST, TENSORS, read_manifest, read_weights
from customized_grpo.training.run_dir import CHECKPOINTS, LOGS, best_iteration, finished_adapter, load_run_config


def export(source: Path, out: Path, *, ema: bool = False, best: bool = False) -> Path:
    """Write the adapter of `source`, a checkpoint or a finished run, with the run's settings and a model card, into the
    folder `out`.

    The adapter has the tensors and settings that `train` writes; with `ema`, the averaged weights; with `best`, those
    of the best validation of a run. Returns `out`. The generator is not loaded. Raises `UserError` if `source` is
    neither, or `out` is not empty.
    """
    check_folder(out, "OUT")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"OUT: {out} is not empty; name a new folder, or delete it first")
    if best and (source / MANIFEST).is_file():
        raise UserError(f"--best: {source} is a checkpoint; name its run, or leave --best out")
    tensors: dict[str, Tensor] = {}
    adapters: list[Path] = []
    if (source / MANIFEST).is_file():
        run = source.resolve().parent.parent
        config = _config_beside(source).model_copy(update={"iterations": read_manifest(source).iteration})
        tensors = read_weights(source, flatten(config.model_dump(mode="json")), average=ema)
        check_finite(tensors, source / TENSORS)
    elif source.parent.name == CHECKPOINTS:
        raise UserError(
            f"SOURCE: {source} is no checkpoint: it has no {MANIFEST}; name a folder RUN/checkpoints/000020"
        )
    else:
        run, config = source, load_run_config(source)
        folder = finished_adapter(source, "SOURCE", "export its newest checkpoint,", ema=ema, best=best)
        adapters = sorted(folder.glob("*.safetensors"))
        if not adapters:
            raise UserError(f"SOURCE: {folder} has no adapter; go on with the run with train --resume")
        for path in adapters:
            read_tensors(path)
    settings = config.model_copy(update={"output": out}).model_dump(mode="json")
    iteration = best_iteration(run) if best else None
    if iteration is None and not tensors and (last := last_row(run / LOGS[0])):
        iteration = int(last["iteration"])  # a run may end before its last iteration
    what = Exported(
        config.iterations if iteration is None else iteration,
        averaged=ema or (best and config.ema.decay is not None and config.ema.evaluate),
        best=best,
        checkpoint=bool(tensors),
    )
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(path.stat().st_size for path in adapters)
    with writing(out, size):
        out.mkdir(parents=True, exist_ok=True)
        write_card(run, out, what, settings, _base_model(config.policy))
        if tensors:
            save_adapter(config.policy, tensors.items(), out)
        for path in adapters:
            shutil.copyfile(path, out / path.name)
        # Last: a folder without it is not taken for a run's.
        write_whole(out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    return out


def _base_model(policy: PolicyConfig) -> str | None:
    """Return the hub id or path of the model that an adapter belongs to; None for ToyBox."""
    if policy.kind not in PIPELINES:
        return None
    from customized_grpo.factory.pipelines import MODELS

    return policy.pipeline.model or MODELS[policy.kind]


def _config_beside(checkpoint: Path) -> Config:
    """Read the configuration of the run whose folder the checkpoint stands in."""
    run = checkpoint.resolve().parent.parent
    try:
        return load_run_config(run)
    except UserError as error:
        raise UserError(
            f"SOURCE: {checkpoint} does not stand in the folder of its run, as RUN/checkpoints/000020: {error}"
        ) from error
