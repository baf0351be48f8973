"""DeepSpeed ZeRO-3: what makes its checkpoints and its start suit a model of which most is frozen."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import torch
from torch import Tensor


def prepare() -> None:
    """Checkpoints without the frozen weights, which DeepSpeed would write and want back; and a start on CPUs too."""
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # several a step, not ours
    engine, load = deepspeed.DeepSpeedEngine, deepspeed.DeepSpeedEngine.load_checkpoint
    engine.save_checkpoint = partialmethod(engine.save_checkpoint, exclude_frozen_parameters=True)
    engine.load_checkpoint = lambda self, *args, **kw: load(self, *args, **{**kw, "load_module_strict": False})
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


@contextmanager
def unshared() -> Iterator[None]:
    """transformers loads whole models in here, though ZeRO-3 is on: some encoders cannot be built in shares."""
    from transformers.integrations import deepspeed as integration

    before, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def gather(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Whole fp32 weights of parameters that all processes hold together; every process has to call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, p in parameters.items():
        if p.requires_grad:
            whole[name] = safe_get_full_fp32_param(p).cpu().view(getattr(p, "ds_shape", p.shape))
        else:
            with deepspeed.zero.GatheredParameters([p]):
                whole[name] = p.detach().float().cpu()
    return whole
