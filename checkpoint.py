"""A model in a folder or on the Hub: config.json, the trained weights, a model card; the frozen parts if asked for.

run/config.json        what the model is made of
run/model.safetensors  what was trained: the projector, LoRA, other weights that were not frozen
run/README.md          the model card
run/llm/, run/encoder/ the frozen parts as transformers saves them, with include_frozen=True
"""

import copy
import json
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import SpeechLLMConfig
from manifest import InputError

CARD = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
base_model:
{base_models}
---
# Speech recognition: {encoder} + {projector} projector + {llm}

| part | |
|---|---|
{parts}

## Use

```python
from model import SpeechLLM

model = SpeechLLM.from_pretrained("{name}")
print(model.transcribe("a.wav", num_beams=4))
```
"""


def find_folder(name_or_path: str, revision: str | None = None) -> Path:
    """A local folder as it is, a Hub name as the folder that it is downloaded to."""
    from huggingface_hub import snapshot_download

    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision))
    except (OSError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise InputError(f"{name_or_path}: no such folder, nor a model on the Hub ({found})") from None


def load_config(folder: Path, **overrides) -> SpeechLLMConfig:
    """The config of a checkpoint folder; `overrides` replace fields of it (a moved LLM's path, say)."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.get("model_type") != SpeechLLMConfig.model_type:
            raise ValueError("it describes another kind of model")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; wanted a folder that train.py or save_pretrained wrote") from None
    for part in ("encoder_name_or_path", "llm_model_name_or_path"):  # frozen parts in the folder itself
        if found.get(part) and (folder / found[part]).exists():
            found[part] = str(folder / found[part])
    return SpeechLLMConfig(**{**found, **overrides})


def save(model, folder: str | Path, include_frozen: bool = False, state: dict[str, Tensor] | None = None) -> None:
    """Write what was trained (`state` if it lives elsewhere), config.json and the model card.

    With `include_frozen` the encoder and the LLM too, with feature extractor and tokenizer: the folder then needs
    nothing else.
    """
    folder, config = Path(folder), copy.copy(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    if include_frozen:
        model.encoder.feature_extractor.save_pretrained(folder / "encoder")
        model.encoder.model.save_pretrained(folder / "encoder", state_dict=without_lora(model.encoder.model))
        model.tokenizer.save_pretrained(folder / "llm")
        model.llm.save_pretrained(folder / "llm", state_dict=without_lora(model.llm))
        config.encoder_name_or_path, config.llm_model_name_or_path = "encoder", "llm"
        config.encoder_revision = config.llm_revision = None
    elif model.merged:
        raise InputError(f"{folder}: LoRA was merged into the LLM's weights; save them with include_frozen=True")
    state = {name: p.detach() for name, p in model.saved().items()} if state is None else state
    partial = folder / "model.safetensors.partial"
    save_file({name: t.contiguous().cpu() for name, t in state.items()}, partial, {"format": "pt"})
    partial.replace(folder / "model.safetensors")
    written = {"model_type": config.model_type, "architectures": [type(model).__name__]}
    written |= {name: getattr(config, name) for name in type(config).__annotations__}  # Trainer leaves others there
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(config, folder.resolve().name), encoding="utf-8")


def without_lora(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it would be without LoRA beside it."""
    return {name.replace(".base_layer", ""): t for name, t in module.state_dict().items() if ".lora_" not in name}


def load_trained(model, path: str | Path) -> None:
    """Read what was trained, tensor by tensor; InputError names every missing, extra or wrongly shaped one.

    Weights of the encoder or the LLM may be among them: they were trained then, and are saved again.
    """
    parameters, wanted = dict(model.named_parameters()), model.saved()
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(p.shape) for name, p in parameters.items() if name in wanted or name in found}
            if wrong := [name for name in shapes | found if shapes.get(name) != found.get(name)]:
                c = model.config
                made = f"encoder width {c.encoder_size}, LLM width {c.hidden_size}, {c.projector} projector of stride "
                made += f"{c.projector_stride}, hidden size {c.projector_hidden_size}"
                raise InputError(f"{path}: does not fit {made}: {misfits(wrong, shapes, found)}")
            for name in found:
                parameters[name].data.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the trained weights ({error})") from None
    model.kept |= found.keys()


def misfits(names: list[str], shapes: dict[str, tuple], found: dict[str, tuple]) -> str:
    texts = [f"{name} is {found.get(name, 'missing')}, wanted {shapes.get(name, 'no such tensor')}" for name in names]
    if any(0 in found.get(name, ()) for name in names):
        texts.insert(0, "tensors of size 0, which ZeRO-3 leaves where weights are saved without being gathered")
    more = [f"and {len(texts) - 12} more"] if len(texts) > 12 else []
    return "; ".join(texts[:12] + more)


def push_to_hub(model, repo_id: str, include_frozen: bool = False, revision: str | None = None, **options) -> str:
    """Upload what `save` writes to a repository on the Hub, made if need be; `options` of create_repo (private ...)."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    repo_id = api.create_repo(repo_id, exist_ok=True, **options).repo_id
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, include_frozen)
        Path(folder, "README.md").write_text(model_card(model.config, repo_id), encoding="utf-8")
        message = "Speech recognition: trained weights and config"
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message))


def model_card(config: SpeechLLMConfig, name: str) -> str:
    """README.md: the parts and their revisions, data, error rate, how to use it."""
    encoder, llm = config.encoder_name_or_path, config.llm_model_name_or_path
    adapted = [f"LoRA of rank {rank} on the {part}" for part, rank in
               (("LLM", config.lora_r), ("encoder", config.encoder_lora_r)) if rank]  # fmt: skip
    rows = {
        "encoder": f"{encoder}, {config.encoder_revision or 'default revision'}",
        "projector": f"{config.projector}, {config.projector_stride} frames an embedding",
        "LLM": f"{llm}, {config.llm_revision or 'default revision'}",
        "adapted": ", ".join(adapted) or "neither encoder nor LLM",
        "prompt": json.dumps(config.prompt, ensure_ascii=False),
        **(config.training or {"trained on": "not recorded"}),
    }
    hub_names = [part for part in (encoder, llm) if part and part.count("/") == 1 and not part.startswith((".", "/"))]
    return CARD.format(
        base_models="".join(f"  - {part}\n" for part in hub_names).rstrip() or "  []",
        encoder=Path(encoder).name, projector=config.projector, llm=Path(llm).name, name=name,
        parts="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )  # fmt: skip
