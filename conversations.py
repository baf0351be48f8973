"""Conversations of several turns: "messages" in a manifest, `prompts` of SpeechLLM.generate."""

import textwrap

from errors import InputError


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
