"""A question -> a harmony conversation -> token ids."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from openai_harmony import (
    Conversation,
    DeveloperContent,
    HarmonyError,
    Message,
    ReasoningEffort,
    Role,
    SystemContent,
    ToolDescription,
)

from gptoss_workbench.errors import PromptError

if TYPE_CHECKING:
    from gptoss_workbench.harmony.vocabulary import Vocabulary

EFFORTS = {
    "low": ReasoningEffort.LOW,
    "medium": ReasoningEffort.MEDIUM,
    "high": ReasoningEffort.HIGH,
}

# A tool's name becomes a recipient, `functions.NAME`, which a blank or a `<` would cut short.
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def chat(
    user: str | Sequence[tuple[str, str]],
    system: str | None = None,
    developer: str | None = None,
    effort: str = "medium",
    tools: Sequence[ToolDescription | Mapping] | None = None,
    date: str | datetime.date | None = None,
) -> Conversation:
    """A conversation that waits for the assistant's answer.

    Args:
        user: what the user says; or the turns so far, e.g. ``[("user", "Hi"), ("assistant", "Hello"),
            ("user", "Bye")]``, where the assistant's are its final answers.
        system: replaces the line of identity, "You are ChatGPT, ...", in the system message.
        developer: instructions, the developer message.
        effort: how long to think: "low", "medium" or "high".
        tools: functions that the assistant may call: ``openai_harmony.ToolDescription`` or
            ``{"name": ..., "description": ..., "parameters": JSON schema or None}``.
        date: "Current date" of the system message, e.g. "2026-01-31". None leaves the line out, so that
            the same call gives the same ids every day.

    Returns:
        An ``openai_harmony.Conversation``. ``chat(user)`` holds openai-harmony's own default system
        message and the user's.

    Raises:
        PromptError: an effort, turn or tool that is none.
    """
    messages = [Message.from_role_and_content(Role.SYSTEM, _system(system, effort, date))]
    if developer is not None or tools:
        messages.append(Message.from_role_and_content(Role.DEVELOPER, _developer(developer, tools or ())))
    messages += [_turn(turn) for turn in ([("user", user)] if isinstance(user, str) else _turns(user))]
    return Conversation.from_messages(messages)


def render(vocabulary: Vocabulary, conversation: Conversation) -> list[int]:
    """The ids of a conversation up to and with ``<|start|>assistant``, as openai-harmony renders them.

    Text is never read for special tokens, so "<|end|>" in a message stays text. Note that openai-harmony
    drops the chain of thought before the first final answer, and only there.

    Raises:
        PromptError: no Conversation, or one that openai-harmony refuses.
    """
    if not isinstance(conversation, Conversation):
        raise PromptError(
            "Only a conversation can be rendered.", expected="openai_harmony.Conversation",
            got=type(conversation).__name__, hint="make one with chat(...)",
        )
    try:
        return vocabulary.encoding.render_conversation_for_completion(conversation, Role.ASSISTANT)
    except (HarmonyError, ValueError) as error:
        raise PromptError(
            "openai-harmony cannot render this conversation.", got=error,
            hint="a tool's message needs its name as the author's; text must be valid Unicode",
        ) from error


def _system(identity: str | None, effort: str, date: str | datetime.date | None) -> SystemContent:
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise PromptError("No such effort.", expected=" or ".join(map(repr, EFFORTS)), got=repr(effort))
    content = SystemContent.new().with_reasoning_effort(EFFORTS[effort])
    if identity is not None:
        content = content.with_model_identity(_text(identity, "system"))
    if date is not None:
        day = date.isoformat() if isinstance(date, datetime.date) else date
        content = content.with_conversation_start_date(_text(day, "date"))
    return content


def _developer(instructions: str | None, tools: Sequence[ToolDescription | Mapping]) -> DeveloperContent:
    content = DeveloperContent.new()
    if instructions is not None:
        content = content.with_instructions(_text(instructions, "developer"))
    if not tools:
        return content
    if isinstance(tools, (str, Mapping, ToolDescription)):
        raise PromptError("tools must be a list.", expected="[tool, ...]", got=type(tools).__name__)
    described = [_tool(tool) for tool in tools]
    names = [tool.name for tool in described]
    if len(set(names)) < len(names):
        raise PromptError("Two tools of one name.", expected="names that differ", got=", ".join(names))
    return content.with_function_tools(described)


def _tool(tool: object) -> ToolDescription:
    fields = tool.model_dump() if isinstance(tool, ToolDescription) else tool
    if not isinstance(fields, Mapping) or not {"name"} <= set(fields) <= set(ToolDescription.model_fields):
        raise PromptError(
            "A tool that cannot be understood.",
            expected="a ToolDescription, or a dict of name, description and parameters", got=repr(tool)[:60],
        )
    name, description = fields["name"], fields.get("description") or ""
    parameters = fields.get("parameters")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise PromptError(
            "A tool's name must be one word.", got=repr(name),
            expected="letters, digits, _ . or -, beginning with a letter or _",
        )
    if parameters is not None and not isinstance(parameters, dict):
        raise PromptError(
            f"The parameters of the tool {name!r} are no JSON schema.", expected="a dict, or None",
            got=type(parameters).__name__,
        )
    return ToolDescription.new(name, _text(description, "description"), parameters)


def _turns(turns: object) -> Sequence:
    if not isinstance(turns, Sequence) or not turns:
        raise PromptError(
            "A conversation needs a user's turn.", expected='a str, or a list such as [("user", "Hi"), ...]',
            got=repr(turns)[:60],
        )
    return turns


def _turn(turn: object) -> Message:
    match turn:
        case ("user", text):
            return Message.from_role_and_content(Role.USER, _text(text, "user"))
        case ("assistant", text):
            answer = Message.from_role_and_content(Role.ASSISTANT, _text(text, "assistant"))
            return answer.with_channel("final")
    raise PromptError(
        "A turn that cannot be understood.", expected='("user", text) or ("assistant", text)',
        got=repr(turn)[:60], hint="use system= and developer= for their messages",
    )


def _text(value: object, name: str) -> str:
    """A str, with lone surrogates (which no UTF-8 can hold) made U+FFFD."""
    if not isinstance(value, str):
        raise PromptError(f"{name} must be text.", expected="str", got=type(value).__name__)
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
