"""How a system prompt and a question become one conversation, in the format a model was trained on.

A GGUF file carries its format as a Jinja template. Running templates needs another package and
gives text in which a prompt could forge control tokens, so the two formats that models of this
architecture mostly use are written out here and recognised by their control tokens; a model with
neither, for example one that was never trained to chat, simply continues the text.
"""

from dataclasses import dataclass

from rocmforge.cli.tokenizer import Special, Tokenizer

__all__ = ["ChatFormat", "chat_format"]


@dataclass(frozen=True)
class ChatFormat:
    """The parts of a conversation; ``{}`` is where the text goes.

    The system part ends and the user part starts at a token boundary by construction: every part is
    encoded for itself. That is what lets all questions share the system part's blocks.
    """

    name: str
    system: tuple[str, ...]
    user: tuple[str, ...]

    def system_tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode the start of a conversation: the start token, if any, and the system prompt."""
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return ids + (tokenizer.encode(_fill(self.system, text)) if text else [])

    def user_tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode a question and the opening of its answer."""
        return tokenizer.encode(_fill(self.user, text))


def _fill(parts: tuple[str, ...], text: str) -> list[str]:
    return [part if isinstance(part, Special) else part.replace("{}", text) for part in parts]


_IM_START, _IM_END = Special("<|im_start|>"), Special("<|im_end|>")
_HEAD, _HEAD_END = Special("<|start_header_id|>"), Special("<|end_header_id|>")
_EOT = Special("<|eot_id|>")

CHATML = ChatFormat(
    "ChatML",
    system=(_IM_START, "system\n{}", _IM_END, "\n"),
    user=(_IM_START, "user\n{}", _IM_END, "\n", _IM_START, "assistant\n"),
)
LLAMA3 = ChatFormat(
    "Llama 3",
    system=(_HEAD, "system", _HEAD_END, "\n\n{}", _EOT),
    user=(_HEAD, "user", _HEAD_END, "\n\n{}", _EOT, _HEAD, "assistant", _HEAD_END, "\n\n"),
)
PLAIN = ChatFormat("plain text", system=("{}\n\n",), user=("{}",))


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Choose the format of a model by its template and its vocabulary."""
    for format_ in (CHATML, LLAMA3):
        names = {part for part in format_.system + format_.user if isinstance(part, Special)}
        if all(name in tokenizer.chat_template and tokenizer.has(name) for name in names):
            return format_
    return PLAIN
