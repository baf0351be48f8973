"""Conversations of several turns: "messages" in a manifest, `prompts` of SpeechLLM.generate."""

import textwrap

from errors import BadUtterance, InputError
from manifest import AUDIO
from sources import RecordList


def check_messages(record: dict, where: str, needs_text: bool) -> None:
    """Raise InputError for a record whose messages are no conversation, or, if it is trained on, have no answer."""
    turns = record["messages"]
    if wrong := wrong_turns(turns):
        raise InputError(f"{where}: {wrong}")
    if not all(isinstance(path, str) for turn in turns for path in turn.get("audio", [])):
        raise InputError(f"{where}: wanted paths in 'audio' of 'messages'")
    if needs_text and (not turns or turns[-1]["role"] != "assistant"):
        raise InputError(f"{where}: the last of 'messages' is not the assistant's; nothing would be trained on")


def wrong_turns(turns: list[dict]) -> str | None:
    """What is wrong with a conversation, None if nothing is.

    Each <audio> needs a clip of its own turn. Where no turn has an <audio>, the chat template places them.
    """
    for turn in turns:
        texts = [turn.get("role"), turn.get("content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not isinstance(turn.get("audio", []), list):
            turn = textwrap.shorten(str(turn), 80, placeholder=" ...")
            return f"{turn} in the conversation; wanted texts in 'role', 'content' and a list in 'audio'"
    counts = [(turn["content"].count(AUDIO), len(turn.get("audio", []))) for turn in turns]
    if any(num_places for num_places, _ in counts):
        for num_places, num_clips in counts:
            if num_places != num_clips:
                return f"{num_places} {AUDIO} in a turn with {num_clips} audio clips"
    return None


def records_of(prompts: list[list[dict]]) -> RecordList:
    """Records of conversations whose last turn is the user's. Raises BadUtterance for one that does not add up."""
    if not prompts:
        raise ValueError("wanted prompts, found none")
    records = []
    for number, turns in enumerate(prompts, 1):
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"prompt {number}: wanted a list of turns, each with role, content and perhaps audio")
        turns = [turn | {"audio": as_list(turn.get("audio", []))} for turn in turns]
        if wrong := wrong_turns(turns):
            raise BadUtterance(f"prompt {number}: {wrong}")
        if turns[-1]["role"] == "assistant":
            raise ValueError("wanted prompts whose last turn is the user's")
        records.append({"messages": turns})
    return RecordList(records, "prompt")


def as_list(audio) -> list:
    """The clips of a turn; one alone, a path or samples (S,), may stand without its list."""
    return list(audio) if isinstance(audio, (list, tuple)) else [audio]
