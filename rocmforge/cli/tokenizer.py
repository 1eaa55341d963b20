"""Text to tokens and back, from the tokenizer that a GGUF file carries.

Two kinds occur in Llama-architecture files, told apart by ``tokenizer.ggml.model``:

``gpt2``
    Byte-level BPE (SmolLM, Llama 3): merges in the file, and a rule that cuts text into words
    first, named by ``tokenizer.ggml.pre``. The rules are those of the models' own tokenizers.
``llama``
    SentencePiece BPE (Llama 2, TinyLlama, Mistral): no merges but a score per piece; joining the
    best-scored neighbours first is the same as merging in the order of the scores.

The ``tokenizers`` package does the work. Text never matches a control token here: those come in
only as :class:`Special`, so a prompt that spells ``<|im_end|>`` cannot end its own turn.
"""

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from rocmforge.cli.console import CommandError
from rocmforge.cli.gguf_file import GGUFFile

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Detokenizer", "Special", "Tokenizer"]

# Values of tokenizer.ggml.token_type, from the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# How Llama 3's tokenizer cuts text into words (its published regular expression).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of tokenizer.ggml.pre by what they mean.
GPT2_NAMES = frozenset({"gpt-2", "gpt2"})
SMOLLM_NAMES = frozenset({"smollm", "starcoder", "refact"})  # GPT-2's words, each digit alone
LLAMA3_NAMES = frozenset({"llama-bpe", "llama3", "llama-v3"})

# Control tokens that end an answer in the chat formats of models of this architecture.
END_NAMES = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


class Special(str):
    """The name of a control token, where a sequence of texts is to have that token."""

    __slots__ = ()


class Tokenizer:
    """The tokenizer of a GGUF file.

    Attributes
    ----------
    stop_ids : frozenset of int
        Tokens that end an answer.
    bos_id : int or None
        The token every sequence starts with, if the model wants one.
    chat_template : str
        The file's Jinja template, or an empty string.

    Raises
    ------
    CommandError
        The file has no tokenizer, or one of a kind that is not known here.
    """

    def __init__(self, file: GGUFFile) -> None:
        kind = file.text("tokenizer.ggml.model")
        self._tokens: list[str] = file.array("tokenizer.ggml.tokens")
        count = len(self._tokens)
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self._types: list[int] = (
            file.array("tokenizer.ggml.token_type")
            if file.has("tokenizer.ggml.token_type")
            else [NORMAL] * count
        )
        self._byte_level = kind == "gpt2"
        try:
            if kind == "gpt2":
                self._backend = self._byte_level_bpe(file)
            elif kind == "llama":
                self._backend = self._sentence_piece_bpe(file)
            else:
                raise CommandError(f"{file.path}: tokenizer {kind!r} is not known: gpt2, llama are")
        except CommandError:
            raise
        except Exception as error:  # the backend raises plain Exception, for example on a bad merge
            raise CommandError(f"{file.path}: its tokenizer does not load: {error}") from error
        self._space_prefix = bool(file.integer("tokenizer.ggml.add_space_prefix", kind == "llama"))
        self.chat_template = file.text("tokenizer.chat_template", "")
        wants_bos = file.integer("tokenizer.ggml.add_bos_token", kind == "llama")
        bos = file.integer("tokenizer.ggml.bos_token_id", -1)
        self.bos_id = bos if wants_bos and 0 <= bos < count else None
        stops = {file.integer(f"tokenizer.ggml.{name}_token_id", -1) for name in ("eos", "eot")}
        stops.update(self._ids[name] for name in END_NAMES if name in self._ids)
        self.stop_ids = frozenset(i for i in stops if 0 <= i < count)

    def _byte_level_bpe(self, file: GGUFFile) -> "tokenizers.Tokenizer":
        from tokenizers import Regex, pre_tokenizers
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        merges = []
        for merge in file.array("tokenizer.ggml.merges"):
            left, _, right = merge.partition(" ")
            merges.append((left, right))
        rule = file.text("tokenizer.ggml.pre", "gpt-2")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in LLAMA3_NAMES)
        backend = Backend(BPE(self._ids, merges, ignore_merges=rule in LLAMA3_NAMES))
        if rule in SMOLLM_NAMES:
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        elif rule in LLAMA3_NAMES:
            cut = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([cut, words])
        elif rule in GPT2_NAMES:
            backend.pre_tokenizer = words
        else:
            known = ", ".join(sorted(GPT2_NAMES | SMOLLM_NAMES | LLAMA3_NAMES))
            raise CommandError(
                f"{file.path}: tokenizer.ggml.pre = {rule!r} is not known here; these are: {known}"
            )
        self._add_fixed_tokens(backend)
        return backend

    def _sentence_piece_bpe(self, file: GGUFFile) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        scores: list[float] = file.array("tokenizer.ggml.scores")
        pieces = [
            (-score, i, token)
            for i, (token, kind, score) in enumerate(
                zip(self._tokens, self._types, scores, strict=True)
            )
            if kind in (NORMAL, USER_DEFINED) and len(token) > 1
        ]
        merges = [
            (token[:cut], token[cut:])
            for _, _, token in sorted(pieces)
            for cut in range(1, len(token))
            if token[:cut] in self._ids and token[cut:] in self._ids
        ]
        unknown = self._tokens[file.integer("tokenizer.ggml.unknown_token_id", 0)]
        backend = Backend(
            BPE(self._ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        self._add_fixed_tokens(backend)
        return backend

    def _add_fixed_tokens(self, backend: "tokenizers.Tokenizer") -> None:
        from tokenizers import AddedToken

        for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
            names = [
                token for token, its in zip(self._tokens, self._types, strict=True) if its == kind
            ]
            added = [AddedToken(name, special=special, normalized=False) for name in names]
            if special:
                backend.add_special_tokens(added)
            else:
                backend.add_tokens(added)
        backend.encode_special_tokens = True

    def has(self, name: str) -> bool:
        """Tell whether `name` is a token of the vocabulary."""
        return name in self._ids

    def encode(self, segments: Iterable[str]) -> list[int]:
        """Encode texts and :class:`Special` tokens, in order, to one list of token ids."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Special):
                ids.append(self._ids[segment])
            elif segment:
                text = segment
                if not self._byte_level:
                    text = (" " if self._space_prefix else "") + text
                    text = text.replace(" ", "\u2581")
                ids += self._backend.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's table).

        Printable Latin-1 stands for itself; the other bytes, in order, take characters from U+0100
        on.
        """
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable}
        table.update({chr(256 + i): byte for i, byte in enumerate(others)})
        return table

    def token_bytes(self, token_id: int) -> bytes:
        """Give the UTF-8 bytes token `token_id` stands for; none for a control token."""
        token, kind = self._tokens[token_id], self._types[token_id]
        if kind in (CONTROL, UNKNOWN):
            return b""
        if kind == BYTE:
            return bytes([int(token[3:-1], 16)])  # written <0xNN>
        if kind == USER_DEFINED:
            return token.encode()
        if self._byte_level:
            table = self._byte_of
            return (
                bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
            )
        return token.replace("\u2581", " ").encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Give the text of `token_ids`; broken UTF-8 shows as U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    A character may be spread over several tokens; it appears when its last byte does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Give the text that `token_id` completes, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Give what is left when no more tokens come."""
        return self._decoder.decode(b"", final=True)
