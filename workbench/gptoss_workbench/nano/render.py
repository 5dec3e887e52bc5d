"""Harmony text of the corpus. Prefixes come from openai_harmony itself; single messages are spelled out here
(and a test holds them equal to what openai_harmony renders)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
)

from gptoss_workbench.harmony import load_vocabulary

EFFORTS = ("low", "medium", "high")
ASSISTANT = "<|start|>assistant"


@dataclass(frozen=True)
class Tool:
    """A function the model may call: what it looks up and how its result reads."""

    name: str
    description: str
    parameter: str

    def describe(self) -> ToolDescription:
        return ToolDescription.new(
            self.name,
            self.description,
            parameters={
                "type": "object",
                "properties": {self.parameter: {"type": "string"}},
                "required": [self.parameter],
            },
        )


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("get_weather", "Gets the weather in a city.", "location"),
        Tool("get_time", "Gets the local time in a city.", "city"),
        Tool("get_population", "Gets the number of people in a country.", "country"),
    )
}


def encode(text: str) -> list[int]:
    """Token ids of `text`, special tokens included."""
    return load_vocabulary().encode(text)


def decode(ids: Sequence[int]) -> str:
    return load_vocabulary().decode(ids)


def prefix_messages(
    effort: str, date: str | None, instructions: str | None, tools: Sequence[str]
) -> list[Message]:
    """System message and, where there is something to say, developer message."""
    system = SystemContent.new().with_reasoning_effort(ReasoningEffort[effort.upper()])
    if date is not None:
        system = system.with_conversation_start_date(date)
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    if instructions is not None or tools:
        developer = DeveloperContent.new()
        if instructions is not None:
            developer = developer.with_instructions(instructions)
        if tools:
            developer = developer.with_function_tools([TOOLS[name].describe() for name in tools])
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    return messages


@functools.lru_cache(maxsize=20_000)
def prefix_ids(
    effort: str, date: str | None, instructions: str | None, tools: tuple[str, ...]
) -> tuple[int, ...]:
    """Token ids of system and developer message as openai_harmony renders them."""
    conversation = Conversation.from_messages(prefix_messages(effort, date, instructions, tools))
    config = RenderConversationConfig(auto_drop_analysis=False)
    return tuple(load_vocabulary().encoding.render_conversation(conversation, config))


def user_text(user: str) -> str:
    return f"<|start|>user<|message|>{user}<|end|>"


def analysis_text(analysis: str) -> str:
    """What the model writes after `<|start|>assistant` to think aloud, up to its next message."""
    return f"<|channel|>analysis<|message|>{analysis}<|end|>{ASSISTANT}" if analysis else ""


def final_text(final: str) -> str:
    return f"<|channel|>final<|message|>{final}<|return|>"


def past_final_text(final: str) -> str:
    """A finished answer in the history: closed by `<|end|>`, its analysis dropped."""
    return f"{ASSISTANT}<|channel|>final<|message|>{final}<|end|>"


def call_text(tool: str, arguments: str) -> str:
    """A tool call as the model emits it."""
    return f"<|channel|>commentary to=functions.{tool} <|constrain|>json<|message|>{arguments}<|call|>"


def past_call_text(tool: str, arguments: str) -> str:
    """A tool call as the renderer writes it into the history (recipient before the channel)."""
    header = f"{ASSISTANT} to=functions.{tool}<|channel|>commentary <|constrain|>json"
    return f"{header}<|message|>{arguments}<|call|>"


def result_text(tool: str, result: str) -> str:
    header = f"<|start|>functions.{tool} to=assistant<|channel|>commentary"
    return f"{header}<|message|>{result}<|end|>"


def result_message(tool: str, result: str) -> Message:
    """The same tool result as a message of openai_harmony."""
    author = Author.new(Role.TOOL, f"functions.{tool}")
    message = Message.from_author_and_content(author, result)
    return message.with_recipient("assistant").with_channel("commentary")
