"""DeepSpeed, here for a model of which most is frozen: --deepspeed.

ZeRO-3 shares all weights out over the processes; ZeRO-2 gradients and the optimiser's states alone.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor


def prepare() -> None:
    """Leave the frozen weights out of DeepSpeed's checkpoints, and let it start on CPUs too."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # several a step, not ours
    engine, load = deepspeed.DeepSpeedEngine, deepspeed.DeepSpeedEngine.load_checkpoint
    engine.save_checkpoint = partialmethod(engine.save_checkpoint, exclude_frozen_parameters=True)
    engine.load_checkpoint = lambda self, *args, **kw: load(self, *args, **{**kw, "load_module_strict": False})
    state_dict = engine.module_state_dict

    def trained_state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Without frozen weights by their second names either: a tied vocabulary projection is half a gigabyte."""
        names = {name for name, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: p for name, p in state_dict(self, *args, **kwargs).items() if name not in names}

    engine.module_state_dict = trained_state_dict
    # Before the LLM is loaded, or DeepSpeed on CPUs believes that there is one process.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


@contextmanager
def unsharded() -> Iterator[None]:
    """transformers loads whole models in here, though ZeRO-3 is on: some encoders cannot be built in shards."""
    from transformers.integrations import deepspeed as integration

    reference, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def gather(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Whole fp32 weights of parameters that all processes hold together; every process has to call it."""
    weights = {}
    for name, p in parameters.items():
        if p.requires_grad:
            shape = getattr(p, "ds_shape", p.shape)  # ZeRO-2 shards no weights
            weights[name] = safe_get_full_fp32_param(p).cpu().view(shape)
        else:
            with deepspeed.zero.GatheredParameters([p]):
                weights[name] = p.detach().float().cpu()
    return weights
