"""DeepSpeed ZeRO-3: what makes its checkpoints and its start suit a model of which most is frozen."""

import warnings
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


def gather(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Whole fp32 weights of parameters that all processes hold together; every process has to call it."""
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.zero import GatheredParameters

    whole = {}
    for name, p in parameters.items():
        if p.requires_grad:
            whole[name] = safe_get_full_fp32_param(p).cpu().view(p.ds_shape)
        else:
            with GatheredParameters([p]):
                whole[name] = p.detach().float().cpu()
    return whole
