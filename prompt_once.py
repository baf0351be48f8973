"""The prompt once: the keys and values of the tokens before <audio>, which a frozen LLM makes alike in every batch.

A row of a batch is [padding][prompt][speech][rest of the prompt][transcript]. No token looks ahead, so the keys and
values of [prompt] depend on nothing in the batch: they are computed once for one row, kept beside the LLM, and read by
every row. Columns are put in another order for that, [prompt][padding][speech] ...: positions come from the attention
mask, so no result changes but by rounding. Of a batch with other prompts or conversations the tokens count with which
all rows begin as the model's own prompt does.

The plain way is taken, by itself,
- in training, where weights of the LLM are trained (LoRA too: gradients go through the prompt), or where dropout or
  NEFTune make a prompt another one in each batch;
- for LLMs that cannot be told positions (Bloom, MPT), or whose layers keep other things than keys and values (Mamba);
- for a batch longer than a sliding window, or than the positions from which Phi-3's long RoPE takes other frequencies:
  a window counts columns, and padding would stand inside it;
- where labels are on the prompt, or logits wanted of it.
"""

import inspect
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from dataset import IGNORE

IS_ON = True  # tests and tools/benchmark.py compare with False
FEWEST = 2  # tokens that are worth it
OPTIONS = {"max_new_tokens", "num_beams", "num_return_sequences", "length_penalty", "do_sample", "top_k"}
OPTIONS |= {"stopping_criteria", "logits_processor"}  # options of generate that leave the cache alone


@dataclass(frozen=True, eq=False)
class Prompt:
    """What an LLM makes of the tokens before <audio>; nothing of it is ever changed."""

    state: tuple  # of all that it was made of
    longest: int  # columns of a batch that may be read with it
    embeds: Tensor  # (P, H)
    layers: list[tuple[Tensor, Tensor]]  # keys and values of each layer, (1, heads, P, width)


PROMPTS: WeakKeyDictionary[PreTrainedModel, Prompt] = WeakKeyDictionary()  # not on the LLM: copies and files lack them


class ConstantLayer(DynamicLayer):
    """A layer's keys and values that a forward pass reads and does not change: so it may be computed a second time."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Those of the prompt before those of a batch: (B, heads, L, width) -> (B, heads, P + L, width)."""
        rows = (len(keys), -1, -1, -1)
        return torch.cat([self.keys.expand(rows), keys], 2), torch.cat([self.values.expand(rows), values], 2)


def for_training(llm: PreTrainedModel, prompt_ids: list[int], inputs: dict[str, Tensor], labels: Tensor) -> dict:
    """The LLM's inputs (B, L) without the columns of the prompt, and its keys and values; or `inputs` as they are.

    `inputs` are inputs_embeds, attention_mask and position_ids; labels (B, K) are those of the last K positions.
    """
    embeds, mask, positions = (inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids"))
    are_trained = torch.is_grad_enabled() and any(p.requires_grad for p in llm.parameters())
    if not IS_ON or are_trained or is_random(llm):
        return inputs
    for layer in llm.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = True  # it computes its activations again, from the same ConstantLayer
    prompt = prompt_of(llm, prompt_ids)
    num_wanted = labels.shape[1] + 1  # logits of a row: the token before a label predicts it
    labels = F.pad(labels, (mask.shape[1] - labels.shape[1], 0), value=IGNORE)  # (B, L)
    first = positions.masked_fill(labels == IGNORE, mask.shape[1]).min()  # position of a label
    most = (first - 1).clamp(max=mask.shape[1] - num_wanted)
    size = common_size(prompt, embeds, mask, positions, most) if mask.shape[1] <= prompt.longest else 0
    if size < FEWEST:
        return inputs
    cache = DynamicCache()
    cache.layers = [ConstantLayer(keys[:, :, :size], values[:, :, :size]) for keys, values in prompt.layers]
    shorter = {"inputs_embeds": embeds[:, size:], "position_ids": positions[:, size:]}  # (B, L - size)
    return inputs | shorter | {"attention_mask": prompt_first(mask, positions, size), "past_key_values": cache}


def for_decoding(llm: PreTrainedModel, prompt_ids: list[int], inputs: dict[str, Tensor], options: dict) -> dict:
    """What transformers' generate takes in place of inputs_embeds and attention_mask, padded on the left.

    `options` are those of generate, which wants the cache with a row for each beam or sample, and all L columns of the
    embeddings: it leaves out as many as the cache has. The plain way is taken with options that may replace the cache.
    """
    embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
    if not IS_ON or not {"max_new_tokens"} <= options.keys() <= OPTIONS:
        return inputs
    prompt, positions = prompt_of(llm, prompt_ids), (mask.cumsum(1) - 1).clamp(min=0)
    is_short = mask.shape[1] + options["max_new_tokens"] <= prompt.longest
    size = common_size(prompt, embeds, mask, positions, mask.sum(1).min() - 1) if is_short else 0
    if size < FEWEST:
        return inputs
    cache, copies = DynamicCache(), max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    for index, (keys, values) in enumerate(prompt.layers):
        rows = (len(mask) * copies, -1, -1, -1)
        cache.update(keys[:, :, :size].expand(rows), values[:, :, :size].expand(rows), index)
    return {"inputs_embeds": embeds, "attention_mask": prompt_first(mask, positions, size), "past_key_values": cache}


def is_random(llm: PreTrainedModel) -> bool:
    """Whether a forward pass may make something else of the same tokens each time, by dropout or NEFTune.

    In a frozen LLM without either, two kinds of modules are in training mode: the embedding, where NEFTune would be,
    and layers that compute their activations again. OPT's have a dropout of their own, others in modules inside.
    """
    embedding = llm.get_input_embeddings()
    if embedding.training and hasattr(embedding, "neftune_noise_alpha"):
        return True
    layers = {m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer) and not vars(m).get("dropout")}
    return any(module.training for module in llm.modules() if module is not embedding and module not in layers)


def prompt_of(llm: PreTrainedModel, prompt_ids: list[int]) -> Prompt:
    """What the LLM makes of these tokens now: computed at first, and again after a change of a weight or a dtype.

    A change goes unseen if it is written to `weight.data` in place. Under ZeRO-3 all processes come here in the same
    step, whatever their batches hold: so they gather the weights together.
    """
    kind = llm.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    versions = [(p.dtype, p.device, 0 if p.is_inference() else p._version) for p in llm.parameters()]
    state = tuple(prompt_ids), dtype, tuple(versions)
    prompt = PROMPTS.get(llm)
    if prompt is None or prompt.state != state:
        size, cache = longest(llm), DynamicCache()
        with torch.inference_mode(False), torch.no_grad():  # training may come after decoding
            ids = torch.tensor([prompt_ids], dtype=torch.long, device=llm.device)  # (1, P)
            embeds = llm.get_input_embeddings()(ids)  # (1, P, H)
            if size and len(prompt_ids) >= FEWEST:
                llm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        prompt = PROMPTS[llm] = Prompt(state, size if layers else 0, embeds[0], layers)
    return prompt


def longest(llm: PreTrainedModel) -> int:
    """Columns up to which positions alone decide what a token sees; 0 for LLMs of which that is not known."""
    config = llm.config.get_text_config()
    layers = DynamicCache(config=config).layers
    knows_positions = {"position_ids", "past_key_values"} <= inspect.signature(llm.forward).parameters.keys()
    if not knows_positions or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    limits = [layer.get_max_length() for layer in layers if layer.is_sliding]
    rope = config.to_dict().get("rope_parameters") or {}  # or those of each type of layer
    for kind in [rope] if "rope_type" in rope else rope.values():
        limits += [kind["original_max_position_embeddings"]] if kind["rope_type"] == "longrope" else []
    return min(limits, default=config.max_position_embeddings)


def common_size(prompt: Prompt, embeds: Tensor, mask: Tensor, positions: Tensor, most: Tensor) -> int:
    """The number of tokens, up to `most`, with which all rows begin as the prompt does; waits for the device."""
    order = torch.arange(len(prompt.embeds), device=mask.device)  # (P,)
    columns = (mask.long().argmax(1, keepdim=True) + order).clamp(max=mask.shape[1] - 1)  # (B, P) the first tokens
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(1)
    is_same = (embeds.detach()[rows, columns] == prompt.embeds).all(2) & (positions[rows, columns] == order)  # (B, P)
    return int(is_same.all(0).long().cumprod(0).sum().minimum(most))


def prompt_first(mask: Tensor, positions: Tensor, size: int) -> Tensor:
    """The attention mask (B, L) of rows whose first `size` tokens stand in the first columns, before the padding.

    The tokens behind them are where they were: padding stands on the left, so none of theirs was among these columns.
    """
    rest = mask[:, size:] * (positions[:, size:] >= size)
    return torch.cat([torch.ones_like(mask[:, :size]), rest], 1)
