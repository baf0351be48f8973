"""Tiny random models of the families that we support, in folders as the Hub has them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

# LLMs
#
# Chat templates in the style of the models that they are named after, with what makes each of them awkward: default
# system prompts, dates, stripped contents, refused roles, empty think blocks, bos in the text itself.

ROLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
QWEN2 = CHATML_DEFAULT_SYSTEM + ROLE + ASK
QWEN2_5 = CHATML_DEFAULT_SYSTEM.replace("You are", "You are Qwen,") + ROLE + ASK
NO_THOUGHTS = "<think>\n\n</think>\n\n"
QWEN3 = (  # the last answer has its thoughts in front, asked for or not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    f"{{% if m.role == 'assistant' and loop.last %}}{NO_THOUGHTS}{{% endif %}}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    f"{{% if enable_thinking is defined and enable_thinking is false %}}{NO_THOUGHTS}{{% endif %}}{{% endif %}}"
)
LLAMA = (  # the system turn is always there, and tells the date
    "{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for m in turns %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate: user, assistant, user ...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def make_llm_tokenizer(chat_template: str | None, special: str, adds_bos: bool = False, **roles):
    """A byte-level BPE tokenizer of at most 320 tokens; `special` are its special tokens, `roles` bos_token and so on.

    `adds_bos`: puts its bos in front of any text by itself, as LLaMA's, Mistral's and Gemma's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special.split(), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["hello world transcribe the speech user assistant"], trainer)
    if adds_bos:
        bos = roles["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    tokenizer.chat_template = chat_template
    return tokenizer


def save_llm(folder: Path, name: str, tokenizer, stops: str, generation: dict | None = None, **sizes) -> Path:
    """A random model of transformers, in a folder as the Hub has it, with its tokenizer.

    `stops` are the end tokens in its generation config, `generation` what else stands there.
    """
    import transformers

    torch.manual_seed(0)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    common = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 1024}
    sizes = common | {"vocab_size": len(tokenizer), "initializer_range": 0.5} | sizes  # 0.5: answers differ by clip
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes | ids))
    stop_ids = tokenizer.convert_tokens_to_ids(stops.split())
    ids |= {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    model.generation_config = transformers.GenerationConfig(**ids, **generation or {})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_qwen(folder: Path, name: str, chat_template: str, **sizes) -> Path:
    """As Qwens are published: no bos, two end tokens, sampling by default, more embeddings than tokens.

    Their think tags are ordinary tokens, which stay in a decoded text.
    """
    special = "<|endoftext|> <|im_start|> <|im_end|>"
    tokenizer = make_llm_tokenizer(chat_template, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    chat = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    sizes |= {"vocab_size": 352, "tie_word_embeddings": True}
    return save_llm(folder, name, tokenizer, "<|im_end|> <|endoftext|>", chat, **sizes)


def make_llama(folder: Path) -> Path:
    """As LLaMA 3 Instruct is published: bos from template and tokenizer, three end tokens, no pad token."""
    special = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = make_llm_tokenizer(LLAMA, special, adds_bos=True, **roles)
    chat = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return save_llm(folder, "Llama", tokenizer, "<|end_of_text|> <|eom_id|> <|eot_id|>", chat)


def make_mistral(folder: Path) -> Path:
    """As Mistral Instruct is published: no system role, no pad token, a plain </s> at the end."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = make_llm_tokenizer(MISTRAL, "<unk> <s> </s> [INST] [/INST]", adds_bos=True, **roles)
    return save_llm(folder, "Mistral", tokenizer, "</s>", sliding_window=None)


def make_gemma(folder: Path) -> Path:
    """As Gemma 2 is published: the turn ends with another token than the tokenizer's eos, and embeddings are scaled.

    Not tied to the output as theirs are: with random weights that would say the same token for ever.
    """
    special = "<pad> <eos> <bos> <start_of_turn> <end_of_turn>"
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = make_llm_tokenizer(GEMMA, special, adds_bos=True, **roles)
    return save_llm(folder, "Gemma2", tokenizer, "<eos> <end_of_turn>", tie_word_embeddings=False)


def make_phi(folder: Path) -> Path:
    """As Phi-3 is published: a token for each role; answers end with <|end|>, and eos is the pad token."""
    special = "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>"
    roles = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = make_llm_tokenizer(PHI, special, **roles)
    return save_llm(folder, "Phi3", tokenizer, "<|endoftext|> <|assistant|> <|end|>")


def make_gpt2(folder: Path) -> Path:
    """As GPT-2 is published: no chat template, one special token for everything, learned absolute positions."""
    tokenizer = make_llm_tokenizer(None, "<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return save_llm(folder, "GPT2", tokenizer, "<|endoftext|>")


LLMS: dict[str, Callable[[Path], Path]] = {
    "qwen2": partial(make_qwen, name="Qwen2", chat_template=QWEN2),
    "qwen2_5": partial(make_qwen, name="Qwen2", chat_template=QWEN2_5),
    "qwen3": partial(make_qwen, name="Qwen3", chat_template=QWEN3),
    "llama": make_llama,
    "mistral": make_mistral,
    "gemma": make_gemma,
    "phi": make_phi,
    "gpt2": make_gpt2,
}


# Encoders
#
# Real kernels and strides, so that frames come at the real rate; everything else is as small as can be.


def save_encoder(folder: Path, model, feature_extractor) -> Path:
    """A model of transformers and its preprocessor_config.json, with random biases, norms and statistics.

    As they are initialised they are zeros and ones, with which padding leaves fewer traces than in a trained model.
    """
    torch.manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.data += 0.3 * torch.rand_like(tensor)
    model.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    return folder


def make_whisper_openai(folder: Path, num_mels: int = 80, width: int = 32) -> Path:
    """A .pt file of openai-whisper, in half precision as theirs are."""
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    dims = ModelDimensions(
        num_mels, 1500, width, 2, 3, n_vocab=64, n_text_ctx=16, n_text_state=16, n_text_head=2, n_text_layer=1
    )
    torch.save({"dims": dims.__dict__, "model_state_dict": Whisper(dims).half().state_dict()}, folder / "whisper.pt")
    return folder / "whisper.pt"


def make_whisper_hf(folder: Path, num_mels: int = 80) -> Path:
    """Encoder and decoder, of which only the encoder is wanted."""
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 3, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(num_mel_bins=num_mels, max_target_positions=16, **sizes, **heads, **tokens)
    model = transformers.WhisperForConditionalGeneration(config)
    return save_encoder(folder, model, transformers.WhisperFeatureExtractor(feature_size=num_mels))


def make_wave_encoder(
    folder: Path, name: str, head: str = "Model", large: bool = False, normalize: bool = True, **options
) -> Path:
    """A model of raw samples. Base ones normalise their first convolution over time, large ones over channels."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "initializer_range": 0.2}
    sizes |= {"feat_extract_norm": "layer" if large else "group", "conv_bias": large, "do_stable_layer_norm": large}
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**sizes | options))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=large)
    return save_encoder(folder, model, extractor)


def make_w2v_bert(folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"conv_depthwise_kernel_size": 7, "initializer_range": 0.2}
    model = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**sizes))
    return save_encoder(folder, model, transformers.SeamlessM4TFeatureExtractor(padding_value=1))


def make_parakeet(folder: Path, name: str = "ParakeetForCTC", num_mels: int = 80, **options) -> Path:
    """A FastConformer with what is built on it (CTC, a transducer, Canary's decoder), of which only it is wanted."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    encoder = sizes | {"subsampling_conv_channels": 8, "num_mel_bins": num_mels, "initializer_range": 0.2}
    config = getattr(transformers, name).config_class(encoder_config=encoder, **options)
    model = getattr(transformers, name)(config)
    return save_encoder(folder, model, transformers.ParakeetFeatureExtractor(feature_size=num_mels))


def make_canary(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 32}
    options = {"decoder_config": decoder, "vocab_size": 64}
    return make_parakeet(folder, "CanaryForConditionalGeneration", 128, **options)


ENCODERS: dict[str, Callable[[Path], Path]] = {
    "whisper_openai": make_whisper_openai,
    "whisper_hf": make_whisper_hf,
    "wav2vec2_base": partial(make_wave_encoder, name="Wav2Vec2", head="ForCTC"),
    "wav2vec2_large": partial(make_wave_encoder, name="Wav2Vec2", large=True, adapter_attn_dim=8),  # as MMS has it
    "hubert_base": partial(make_wave_encoder, name="Hubert"),
    "hubert_large": partial(make_wave_encoder, name="Hubert", large=True),
    "wavlm_base": partial(make_wave_encoder, name="WavLM", normalize=False),
    "wavlm_large": partial(make_wave_encoder, name="WavLM", large=True),
    "w2v_bert": make_w2v_bert,
    "parakeet": partial(make_parakeet, vocab_size=65, pad_token_id=64),
    "canary": make_canary,
}
