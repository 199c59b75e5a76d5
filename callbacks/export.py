"""The final weights as a small folder that `generate` and others load."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from dllm_var.callbacks.ema import averaged
from dllm_var.checkpoints.adapters import ADAPTER_FOLDER, merge_adapters
from dllm_var.checkpoints.export import save_adapter, save_checkpoint_folder, save_settings
from dllm_var.checkpoints.pretrained import EXPORT_FOLDER, PREFIX
from dllm_var.checkpoints.quantised import dequantised
from dllm_var.model.lora import is_adapter, plain_name
from dllm_var.sampling.base import last_sampler
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.training.strategies import shards_parameters


class ExportWeights(L.Callback):
    """Writes the weights, config and tokenizer into the folder `model` of the run when training ends.

    The weights are the averaged ones where the run keeps such. It is a few megabytes of safetensors without optimizer
    state, loadable by `dllm_var.load_pretrained`. Beside the weights it remembers the sampler of another callback
    (the last one that has any), the step, and whether the data was conversations. Without a logger there is no run
    folder and nothing is written.
    Adapters (`model.lora`) are merged into them there, and lie by themselves in the folder `adapter`, as peft has them.
    Those that act on masks only lie beside the weights, in `model/adapter`, instead of being merged.
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run = trainer.log_dir  # every process must ask
        if not trainer.loggers or run is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if getattr(trainer.strategy, "zero_stage_3", False):
            pl_module.print("weights not exported: with DeepSpeed stage 3 take them from the checkpoint")
            return
        state = gathered_state(trainer) if shards_parameters(trainer.strategy) else None
        self.path = Path(run) / EXPORT_FOLDER
        if trainer.is_global_zero:
            transformer: Any = pl_module.transformer
            tokenizer: Any = pl_module.tokenizer
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            meta = {"sampler": sampler_to_config(last_sampler(callbacks)), "step": trainer.global_step}
            meta["chat"] = bool(getattr(trainer.datamodule, "chats", False))  # type: ignore[attr-defined]
            lora, base = getattr(pl_module, "lora", None), str(getattr(pl_module, "init_from", None))
            with averaged(trainer, pl_module):
                if lora is not None:
                    weights = state or transformer.state_dict()
                    readers = dequantised({name: weights[name].detach for name in weights})
                    save_adapter(Path(run) / ADAPTER_FOLDER, weights, lora, base)
                    save_settings(Path(run) / ADAPTER_FOLDER, transformer, tokenizer, meta)
                    if lora.on_masks_only:
                        save_adapter(self.path / ADAPTER_FOLDER, weights, lora, base)
                        meta["lora"] = asdict(lora)
                        state = {plain_name(name): read() for name, read in readers.items() if not is_adapter(name)}
                    else:
                        state = {name: read().cpu() for name, read in merge_adapters(readers, lora.scaling).items()}
                save_checkpoint_folder(self.path, transformer, tokenizer, meta, state)


def gathered_state(trainer: L.Trainer) -> dict[str, Tensor]:
    """Collects the transformer's weights of all processes in the memory of the first; empty on the others."""
    assert trainer.strategy.model is not None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(trainer.strategy.model, options=options)
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
