"""Conversations of several turns: "messages" in a manifest, `prompts` of SpeechLLM.generate."""

import textwrap
from collections.abc import Callable

from errors import BadUtterance, InputError


def check_messages(record: dict, where: str, needs_text: bool, audio_tag: str) -> None:
    """Raise InputError for a record whose messages are no conversation, or, if it is trained on, have no answer."""
    turns = record["messages"]
    if wrong := wrong_turns(turns, audio_tag):
        raise InputError(f"{where}: {wrong}")
    if not all(isinstance(path, str) for turn in turns for path in turn.get("audio", [])):
        raise InputError(f"{where}: wanted paths in 'audio' of 'messages'")
    if needs_text and (not turns or turns[-1]["role"] != "assistant"):
        raise InputError(f"{where}: the last of 'messages' is not the assistant's; nothing would be trained on")


def wrong_turns(turns: list[dict], audio_tag: str) -> str | None:
    """What is wrong with a conversation, None if nothing is.

    Each `audio_tag` needs a clip of its own turn. Where no turn has one, the chat template places them.
    """
    for turn in turns:
        texts = [turn.get("role"), turn.get("content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not isinstance(turn.get("audio", []), list):
            turn = textwrap.shorten(str(turn), 80, placeholder=" ...")
            return f"{turn} in the conversation; wanted texts in 'role', 'content' and a list in 'audio'"
    counts = [(turn["content"].count(audio_tag), len(turn.get("audio", []))) for turn in turns]
    if any(num_places for num_places, _ in counts):
        for num_places, num_clips in counts:
            if num_places != num_clips:
                return f"{num_places} {audio_tag} in a turn with {num_clips} audio clips"
    return None


def with_labels(
    turns: list[dict], clips: list[list[int]], tokenizer: Callable, render_prompt: Callable, audio_tag: str, ignore: int
) -> tuple[list[int], list[int]]:
    """prompt_ids, and the labels of their last positions, for --train_on_turns all.

    Each answer in the prompt is trained with its end token, and so is tokenised on its own, as the last one is; one
    that holds a clip is not trained. `clips` are the ids of each clip's speech, `render_prompt` is dataset.py's, and
    `ignore` labels what is not trained. Without answers, prompt_ids are as ever, and there is no label.
    Raises BadUtterance where it is not clear what stands where.
    """
    opened, answers = [], []  # turns with the tag in place of an answer; at each tag the answer, None for a clip
    for turn in turns:
        is_answer = turn["role"] == "assistant" and audio_tag not in turn["content"]
        opened.append(turn | {"content": audio_tag} if is_answer else turn)
        answers += [turn["content"]] if is_answer else [None] * turn["content"].count(audio_tag)
    pieces, end_id = render_prompt(tokenizer, opened)  # split at each tag
    if answers.count(None) != len(clips) or len(pieces) != len(answers) + 1:
        raise BadUtterance(f"the chat template places {audio_tag} or leaves turns out; wanted --train_on_turns last")
    ids, speech = list(pieces[0]), iter(clips)
    labels = [ignore] * len(ids)
    for answer, piece in zip(answers, pieces[1:], strict=True):
        labels_of_piece = [ignore] * len(piece)
        if answer is None:
            filling = next(speech)
            labels += [ignore] * len(filling)
        else:
            filling = tokenizer(answer, add_special_tokens=False).input_ids
            labels += filling
            if end_id in piece[:2]:  # a space may come before it
                labels_of_piece[piece.index(end_id)] = end_id
        ids += filling + piece
        labels += labels_of_piece
    first = next((place for place, label in enumerate(labels) if label != ignore), len(labels))
    return ids, labels[first:]
