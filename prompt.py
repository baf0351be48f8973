"""Prompts: a conversation with <audio> in it -> token ids with room for the speech."""

import json
import warnings
from functools import lru_cache

from jinja2 import TemplateError

from manifest import AUDIO, BadUtterance, InputError

PROMPT = f"{AUDIO}\nTranscribe the speech"
SPEECH, START, END = -1, -2, -3  # in input_ids: a speech embedding, a clip's boundary vectors; no vocabulary has them
PLAIN_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}"
    "{{ eos_token if turn.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def set_chat_template(tokenizer, template: str | None) -> None:
    """Give the tokenizer a template in place of its own. A base LLM has none: it gets a plain one, and a warning."""
    if not template and tokenizer.chat_template is None:
        warnings.warn(f"{tokenizer.name_or_path}: no chat template; taking a plain one, 'user: ...'", stacklevel=2)
        template = PLAIN_TEMPLATE
    tokenizer.chat_template = template or tokenizer.chat_template


def conversation(prompt: str, system_prompt: str | None = None) -> list[dict]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": prompt}]


def render_prompt(tokenizer, conversation: str) -> tuple[list[list[int]], int]:
    """Token ids of the pieces of a conversation (JSON) around each <audio>, up to the answer; and its end token's id.

    The chat template is rendered as text, split at <audio> and tokenised piece by piece, so the vocabulary needs no
    new token. The end token is what the template puts after an answer, else the tokenizer's eos.
    """
    return rendered(tokenizer, tokenizer.chat_template, conversation)


@lru_cache(maxsize=64)
def rendered(tokenizer, chat_template: str, conversation: str) -> tuple[list[list[int]], int]:
    def render(messages: list[dict], **options) -> str:  # thinking models are told not to think, LLaMA 3 a fixed date
        options |= {"chat_template": chat_template, "enable_thinking": False, "date_string": "26 Jul 2024"}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:  # Mistral and Gemma have no system prompt, for one
            raise BadUtterance(f"the chat template refuses the conversation ({error})") from None

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    messages = json.loads(conversation)
    pieces = [tokenize(text) for text in render(messages, add_generation_prompt=True).split(AUDIO)]
    answer = "Seven."
    _, found, after = render([*messages, {"role": "assistant", "content": answer}]).rpartition(answer)
    ends = [token for token in tokenize(after) if token in tokenizer.added_tokens_decoder] if found else []
    end_id = ends[0] if ends else tokenizer.eos_token_id
    if end_id is None:
        raise InputError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer has an end token")
    return pieces, end_id
