"""Sharing: Hub names, folders that hold the frozen parts too, the model card, and pushing."""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import RevisionNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errors import InputError
from score import METRICS

if TYPE_CHECKING:
    from model import SpeechLLMConfig

CARD = """---
{{ card_data }}
---
# Speech recognition: {{ title }}

| part | |
|---|---|
{{ table }}

## Use

```python
from model import SpeechLLM

model = SpeechLLM.from_pretrained({{ arguments }})
print(model.transcribe("a.wav", num_beams=4))
```
"""


def download(name: str, revision: str | None, token: str | None) -> Path:
    """The folder that a model's Hub name is downloaded to."""
    files = ["config.json", "model.safetensors", "encoder/*", "llm/*"]  # not an optimizer's state, nor another kind
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except RevisionNotFoundError:
        raise InputError(f"{name}: no revision {revision}; wanted a branch, tag or commit") from None
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{name}: no such folder, nor a model on the Hub ({problem})") from None


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a Hub name had when it was downloaded; `revision` itself where nothing was."""
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else revision  # snapshots/COMMIT/config.json


def save_frozen_parts(
    folder: Path,
    config: "SpeechLLMConfig",
    encoder: nn.Module,
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saved_names: list[str],
    is_merged: bool,
) -> "SpeechLLMConfig":
    """Write encoder/, llm/ and a model card into a folder; the config that names them there."""
    title = folder.resolve().parent.name  # the folder is the unfinished one inside that of the model
    (folder / "README.md").write_text(model_card(config, saved_names, is_merged, title), encoding="utf-8")
    if not callable(getattr(encoder, "save_pretrained", None)):
        raise InputError(f"include_frozen=True: {config.encoder_name_or_path} has no way to be saved; leave it out")
    encoder.save_pretrained(folder / "encoder", state_dict=without_lora(encoder.model))
    tokenizer.save_pretrained(folder / "llm")
    llm.save_pretrained(folder / "llm", state_dict=without_lora(llm))
    config = copy.deepcopy(config)
    config.origin = origin_of(config, is_merged) or None
    config.encoder_name_or_path, config.llm_model_name_or_path = "encoder", "llm"
    config.encoder_revision = config.llm_revision = None
    return config


@contextmanager
def new_files_in(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which go to `folder` together at the end; after an error, none does."""
    partial_folder = folder / "model.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)  # left by a kill
    partial_folder.mkdir(parents=True)  # on the same disk, so that files can be moved in one step
    try:
        yield partial_folder
        mode = (partial_folder / "config.json").stat().st_mode
        for new in [path for path in partial_folder.rglob("*") if path.is_file()]:
            new.chmod(mode)  # safetensors makes files that nobody else may read
            old = folder / new.relative_to(partial_folder)
            old.parent.mkdir(parents=True, exist_ok=True)
            new.replace(old)  # each file is the old one or the new one, never half of it
    finally:
        shutil.rmtree(partial_folder)  # after an error too


def without_lora(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it would be without LoRA beside it."""
    return {name.replace(".base_layer", ""): t for name, t in module.state_dict().items() if ".lora_" not in name}


def origin_of(config: "SpeechLLMConfig", is_merged: bool) -> dict[str, str | None]:
    """Hub names and commits of the frozen parts. Parts with LoRA in their weights are nowhere but here."""
    if is_merged:
        return {}
    names = vars(config) | (config.origin or {})
    return {key: names[key] for part in config.PARTS if not Path(names[part[0]]).exists() for key in part}


def config_for_others(config: "SpeechLLMConfig", is_merged: bool) -> "SpeechLLMConfig":
    """The config with the names that the frozen parts have on the Hub, in place of those on this machine."""
    config = copy.deepcopy(config)
    vars(config).update(origin_of(config, is_merged))
    return config


def push(
    write: Callable[..., None],
    config: "SpeechLLMConfig",
    saved_names: list[str],
    is_merged: bool,
    repo_id: str,
    include_frozen: bool,
    revision: str | None = None,
    commit_message: str = "Speech recognition: trained weights and config",
    token: str | None = None,
    **options,
) -> str:
    """Upload the files that write(folder, config=config) makes, and the model card; the commit's address.

    `options` are those of create_repo: private ... Nothing is made on the Hub if `write` fails.
    """
    config = config_for_others(config, is_merged)
    local = [name for name in (config.encoder_name_or_path, config.llm_model_name_or_path) if Path(name).exists()]
    if local and not include_frozen:
        cure = "push with include_frozen=True, or they must give encoder_name_or_path, llm_model_name_or_path"
        warnings.warn(f"{repo_id}: others do not have {' and '.join(local)} of this machine; {cure}", stacklevel=3)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, config=config)
        repo_id = api.create_repo(repo_id, exist_ok=True, **options).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = model_card(config, saved_names, is_merged, repo_id, revision)
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        place = {"repo_id": repo_id, "revision": revision, "commit_message": commit_message}
        return str(api.upload_folder(folder_path=folder, **place))


def model_card(
    config: "SpeechLLMConfig", saved_names: list[str], is_merged: bool, name: str, revision: str | None = None
) -> str:
    """README.md of a model with the trained weights `saved_names`: parts, data, error rate, how to use it."""
    config = config_for_others(config, is_merged)
    encoder, llm, training = config.encoder_name_or_path, config.llm_model_name_or_path, config.training or {}
    title = f"{Path(encoder).name} + {config.projector} projector + {Path(llm).name}"
    rates = {name: training[f"evaluation {name}"] for name in METRICS if f"evaluation {name}" in training}
    cells = {
        "encoder": f"{encoder}, {config.encoder_revision or 'default revision'}",
        "projector": f"{config.projector}, {config.projector_stride} frames an embedding",
        "LLM": f"{llm}, {config.llm_revision or 'default revision'}",
        "adapted": adapted(config, saved_names, is_merged),
        "prompt": repr(config.prompt),
        **(training or {"trained on": "not recorded"}),
        **{f"evaluation {metric}": f"{rate:.2%}" for metric, rate in rates.items()},
    }
    table = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in cells.items()]
    dataset = {
        "task_type": "automatic-speech-recognition",
        "dataset_type": "manifest",
        "dataset_name": "evaluation set",
    }
    data = ModelCardData(
        pipeline_tag="automatic-speech-recognition",
        model_name=name,
        base_model=[part for part in (encoder, llm) if part.count("/") == 1 and not Path(part).exists()] or None,
        eval_results=[EvalResult(metric_type=m, metric_value=rate, **dataset) for m, rate in rates.items()] or None,
    )
    arguments = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    texts = {"title": title, "table": "\n".join(table), "arguments": arguments}
    return str(ModelCard.from_template(data, template_str=CARD, **texts))


def adapted(config: "SpeechLLMConfig", saved_names: list[str], is_merged: bool) -> str:
    """What of the encoder and the LLM was trained, in words."""
    ranks = {"LLM": config.lora_r, "encoder": config.encoder_lora_r}
    texts = [f"LoRA of rank {rank} on the {part}" for part, rank in ranks.items() if rank]
    texts += ["LoRA, merged into the weights"] if is_merged else []
    parts = {name.partition(".")[0] for name in saved_names if ".lora_" not in name}
    texts += [f"weights of the {part}" for part in ranks if part.lower() in parts]
    return ", ".join(texts) or "neither encoder nor LLM"
