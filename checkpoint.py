"""A model in a folder or on the Hub: config.json, the trained weights, a model card; the frozen parts if asked for.

run/config.json        what the model is made of
run/model.safetensors  what was trained: the projector, LoRA, other weights that were not frozen
run/README.md          the model card
run/llm/, run/encoder/ the frozen parts as transformers saves them, with include_frozen=True
"""

import copy
import json
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import SpeechLLMConfig
from manifest import InputError
from pretrained import UNGATHERED

CARD = """---
pipeline_tag: automatic-speech-recognition
{base_models}---
# Speech recognition: {encoder} + {projector} projector + {llm}

| part | |
|---|---|
{parts}

## Use

```python
from model import SpeechLLM

model = SpeechLLM.from_pretrained({arguments})
print(model.transcribe("a.wav", num_beams=4))
```
"""
RATES = {"evaluation wer": "WER in evaluation", "evaluation cer": "CER in evaluation"}
PARTS = {"encoder_name_or_path": "encoder_revision", "llm_model_name_or_path": "llm_revision"}


def find_weights(name_or_path: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The trained weights in a local folder, or in the one that a Hub name is downloaded to; a file is itself."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    is_folder = Path(name_or_path).is_dir()
    if is_folder or Path(name_or_path).suffix == ".safetensors":
        if revision:
            raise InputError(f"{name_or_path}: revision {revision} of local files; wanted none, or a Hub name")
        return Path(name_or_path, "model.safetensors" if is_folder else "")
    ours = ["config.json", "model.safetensors", "encoder/*", "llm/*"]  # not an optimizer's state, nor another kind
    try:
        folder = snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=ours)
        return Path(folder, "model.safetensors")
    except RevisionNotFoundError:
        raise InputError(f"{name_or_path}: no revision {revision}; wanted a branch, tag or commit") from None
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise InputError(f"{name_or_path}: no such folder, nor a model on the Hub ({found})") from None


def load_config(folder: Path, **overrides) -> SpeechLLMConfig:
    """The config of a checkpoint folder; `overrides` replace fields of it (a moved LLM's path, say)."""
    path = folder / "config.json"
    if not path.is_file() and {"encoder_name_or_path", "llm_model_name_or_path"} <= overrides.keys():
        return SpeechLLMConfig(**overrides)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("model_type") != SpeechLLMConfig.model_type:
            raise ValueError("it describes another kind of model")
        SpeechLLMConfig(**found)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix('config: ')}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; wanted a folder that train.py or save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; wanted a folder that train.py or save_pretrained wrote") from None
    for part in PARTS:  # frozen parts in the folder itself
        if part in overrides:
            found[PARTS[part]] = None  # a commit of the other one
            others = (found.get("origin") or {}).items()
            found["origin"] = {name: value for name, value in others if name not in (part, PARTS[part])}
        elif found.get(part) and (folder / found[part]).exists():
            found[part] = str((folder / found[part]).absolute())
    return SpeechLLMConfig(**{**found, **overrides})


def pin(config: SpeechLLMConfig) -> None:
    """Make the names of the parts good anywhere and at any time: whole paths, and the commits that the Hub gave."""
    from huggingface_hub import try_to_load_from_cache

    for part, revision in PARTS.items():
        name, asked = getattr(config, part), getattr(config, revision)
        if Path(name).exists():
            if asked:
                raise InputError(f"{name}: revision {asked} of local files; wanted none, or a Hub name")
            setattr(config, part, str(Path(name).absolute()))
        elif isinstance(path := try_to_load_from_cache(name, "config.json", revision=asked), str):
            setattr(config, revision, Path(path).parent.name)


def origin(model) -> dict[str, str | None]:
    """Names and commits of the frozen parts, but of those that were never anywhere else than on this machine."""
    if model.merged:
        return {}
    found = vars(model.config) | (model.config.origin or {})
    remote = [part for part in PARTS if not Path(found[part]).exists()]
    return {name: found[name] for part in remote for name in (part, PARTS[part])}


def config_for_others(model) -> SpeechLLMConfig:
    """The config with the names that the frozen parts have elsewhere, in place of those on this machine."""
    config = copy.copy(model.config)
    vars(config).update(origin(model))
    return config


def save(
    model,
    folder: str | Path,
    include_frozen: bool = False,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    **options,
) -> None:
    """Write what was trained (taken from `state_dict` if it lives elsewhere), config.json and the model card.

    With `include_frozen` the encoder and the LLM too, with feature extractor and tokenizer: the folder then needs
    nothing else. A save that fails leaves what was in the folder as it was. `options`, which Trainer and accelerate
    pass to transformers' save_pretrained, are about the form of the files, and there is one form here.
    """
    if options.get("push_to_hub"):
        raise ValueError("save_pretrained(push_to_hub=True): wanted model.push_to_hub(repo_id)")
    if not is_main_process:
        return
    folder = Path(folder)
    partial = folder / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    partial.mkdir(parents=True)
    try:
        write(model, partial, model.config, include_frozen, state_dict)
        card = partial / "README.md"
        card.write_text(model_card(model, folder.resolve().name), encoding="utf-8")
        files = [path for path in partial.rglob("*") if path.is_file()]
        for new in files:
            shutil.copymode(card, new)  # safetensors makes files that nobody else may read
        for new in files:
            old = folder / new.relative_to(partial)
            old.parent.mkdir(parents=True, exist_ok=True)
            new.replace(old)
    finally:
        shutil.rmtree(partial)


def write(model, folder: Path, config: SpeechLLMConfig, include_frozen: bool, state: dict[str, Tensor] | None) -> None:
    """Write the files of `save`, but for the card, into an empty folder."""
    if model.merged and not include_frozen:
        raise InputError("LoRA was merged into the LLM's weights; save them too, with include_frozen=True")
    config = copy.copy(config)
    config.architectures = [type(model).__name__]
    if include_frozen:
        model.encoder.save_pretrained(folder / "encoder", state_dict=without_lora(model.encoder.model))
        model.tokenizer.save_pretrained(folder / "llm")
        model.llm.save_pretrained(folder / "llm", state_dict=without_lora(model.llm))
        config.origin = origin(model) or None
        config.encoder_name_or_path, config.llm_model_name_or_path = "encoder", "llm"
        config.encoder_revision = config.llm_revision = None
    wanted = model.saved()
    state = {name: (wanted if state is None else state)[name].detach().contiguous().cpu() for name in wanted}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def without_lora(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it would be without LoRA beside it."""
    return {name.replace(".base_layer", ""): t for name, t in module.state_dict().items() if ".lora_" not in name}


def load_trained(model, path: str | Path, may_lack: str | None = None) -> None:
    """Read what was trained, tensor by tensor; InputError names every missing, extra or wrongly shaped one.

    Weights of the encoder or the LLM may be among them: they were trained then, are held in fp32 as they were in
    training, and are saved again. Tensors whose names match the pattern `may_lack` may be missing: they stay as they
    are, with a warning, so that a second stage of training can add LoRA to a projector.
    """
    parameters, wanted = dict(model.named_parameters()), model.saved()
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(p.shape) for name, p in parameters.items() if name in wanted or name in found}
            lacking = [name for name in shapes if may_lack and name not in found and re.search(may_lack, name)]
            shapes = {name: shape for name, shape in shapes.items() if name not in lacking}
            if lacking:
                warnings.warn(
                    f"{path}: without {lacking[0]} and the like ({len(lacking)}): they start new", stacklevel=2
                )
            if wrong := [name for name in shapes | found if shapes.get(name) != found.get(name)]:
                c = model.config
                made = f"encoder width {c.encoder_size}, LLM width {c.hidden_size}, {c.projector} projector of stride "
                made += f"{c.projector_stride}, hidden size {c.projector_hidden_size}"
                raise InputError(f"{path}: does not fit {made}: {misfits(wrong, shapes, found)}")
            for name in found:
                part = model.get_submodule(name.partition(".")[0])
                if file.get_slice(name).get_dtype() == "F32" and parameters[name].dtype != torch.float32:
                    part.float()
                parameters[name].data.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the trained weights ({error})") from None
    model.once_trained |= found.keys()


def misfits(names: list[str], shapes: dict[str, tuple], found: dict[str, tuple]) -> str:
    texts = [f"{name} is {found.get(name, 'missing')}, wanted {shapes.get(name, 'no such tensor')}" for name in names]
    if any(0 in found.get(name, ()) for name in names):
        texts.insert(0, UNGATHERED)
    more = [f"and {len(texts) - 12} more"] if len(texts) > 12 else []
    return "; ".join(texts[:12] + more)


def push_to_hub(
    model,
    repo_id: str,
    include_frozen: bool = False,
    revision: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    commit_message: str = "Speech recognition: trained weights and config",
    token: str | None = None,
    **options,
) -> str:
    """Upload what `save` writes to a repository on the Hub, made if need be; the commit's address.

    Frozen parts that came with the model are named by where they once came from. `revision` is a branch, made if need
    be; `options` are those of create_repo: private ...
    """
    from huggingface_hub import HfApi

    config = config_for_others(model)
    local = [name for name in (getattr(config, part) for part in PARTS) if Path(name).exists()]
    if local and not include_frozen:
        cure = "push with include_frozen=True, or they must give encoder_name_or_path, llm_model_name_or_path"
        warnings.warn(f"{repo_id}: others do not have {' and '.join(local)} of this machine; {cure}", stacklevel=2)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(model, Path(folder), config, include_frozen, state_dict)
        repo_id = api.create_repo(repo_id, exist_ok=True, **options).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        Path(folder, "README.md").write_text(model_card(model, repo_id, revision), encoding="utf-8")
        where = {"repo_id": repo_id, "revision": revision, "commit_message": commit_message}
        return str(api.upload_folder(folder_path=folder, **where))


def model_card(model, name: str, revision: str | None = None) -> str:
    """README.md: the parts and their revisions, data, error rate, how to use it."""
    config = config_for_others(model)
    encoder, llm = config.encoder_name_or_path, config.llm_model_name_or_path
    ranks = {"LLM": config.lora_r, "encoder": config.encoder_lora_r}
    adapted = [f"LoRA of rank {rank} on the {part}" for part, rank in ranks.items() if rank]
    adapted += ["LoRA, merged into the weights"] if model.merged else []
    own = {n.partition(".")[0] for n in model.saved() if ".lora_" not in n}
    adapted += [f"weights of the {part}" for part in ranks if part.lower() in own]
    training = config.training or {"trained on": "not recorded"}
    rows = {
        "encoder": f"{encoder}, {config.encoder_revision or 'default revision'}",
        "projector": f"{config.projector}, {config.projector_stride} frames an embedding",
        "LLM": f"{llm}, {config.llm_revision or 'default revision'}",
        "adapted": ", ".join(adapted) or "neither encoder nor LLM",
        "prompt": json.dumps(config.prompt, ensure_ascii=False),
        **{RATES.get(key, key): f"{value:.2%}" if key in RATES else value for key, value in training.items()},
    }
    cells = {key: str(value).replace("|", "\\|") for key, value in rows.items()}
    hub_names = [part for part in (encoder, llm) if part.count("/") == 1 and not Path(part).exists()]
    return CARD.format(
        base_models="".join(["base_model:\n"] * bool(hub_names) + [f"  - {part}\n" for part in hub_names]),
        encoder=Path(encoder).name, projector=config.projector, llm=Path(llm).name,
        arguments=f'"{name}"' + (f', revision="{revision}"' if revision else ""),
        parts="\n".join(f"| {key} | {value} |" for key, value in cells.items()),
    )  # fmt: skip
