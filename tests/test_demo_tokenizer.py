"""Tokens from a GGUF's own tokenizer, text as it streams, and the chat formats."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from rocmforge.cli.chat import chat_format
from rocmforge.cli.console import CommandError
from rocmforge.cli.gguf_file import GGUFFile
from rocmforge.cli.tokenizer import Detokenizer, Special, Tokenizer
from tiny_gguf import TinyModel, byte_characters

TEXTS = [
    "hello world",
    " two  spaces\n\n\ttab\r\n ",
    "12345 3.14",
    "Ünïcödé 漢字 😀 \x00\x7f\x1b",
    "it's we've I'LL <|im_end|> </s>",
    "",
]


def tokenizer(tmp_path, **changes):
    return Tokenizer(GGUFFile(TinyModel().write(tmp_path / "t.gguf", **changes)))


def names(found, ids):
    return [found._tokens[i] for i in ids]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(pre, text, tmp_path):
    found = tokenizer(tmp_path, metadata={"tokenizer.ggml.pre": pre})
    ids = found.encode([text])
    assert found.decode(ids) == text
    assert not set(ids) & {0, 1, 2}  # a control token is never read out of text
    stream = Detokenizer(found)
    assert "".join(map(stream.feed, ids)) + stream.finish() == text


def test_merges_and_control_tokens(tmp_path):
    found = tokenizer(tmp_path)
    ids = found.encode([Special("<|im_start|>"), "hello wuse", Special("<|im_end|>")])
    assert names(found, ids) == ["<|im_start|>", "hello", "Ġw", "use", "<|im_end|>"]
    assert found.token_bytes(1) == b""
    assert found.stop_ids == {0, 2}
    assert found.bos_id is None
    assert found.has("hello")
    assert not found.has("hello ")


def test_words_are_cut_as_the_model_does(tmp_path):
    merges = ["1 2", "Ġ 1"]
    tokens = [*TinyModel().tokens[:259], "12", "Ġ1"]
    changed = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
    }
    cuts = {"smollm": ["Ġ", "1", "2"], "gpt-2": ["Ġ", "12"], "llama-bpe": ["Ġ", "12"]}
    for pre, expected in cuts.items():
        found = tokenizer(tmp_path, metadata=changed | {"tokenizer.ggml.pre": pre})
        assert names(found, found.encode([" 12"])) == expected, pre


def test_a_character_appears_with_its_last_byte(tmp_path):
    found = tokenizer(tmp_path)
    ids = found.encode(["a€"])
    assert len(ids) == 4
    stream = Detokenizer(found)
    assert [stream.feed(i) for i in ids] == ["a", "", "", "€"]
    assert [stream.feed(i) for i in ids[1:3]] == ["", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_byte_characters_agree_with_the_tokenizer(tmp_path):
    found = tokenizer(tmp_path)
    assert [found._byte_of[c] for c in byte_characters()] == list(range(256))


def test_user_defined_tokens(tmp_path):
    tokens = [*TinyModel().tokens, "<tool>", "œfancy"]
    changed = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 5) + [4, 1],
    }
    found = tokenizer(tmp_path, metadata=changed)
    ids = found.encode(["hello<tool>"])
    assert names(found, ids) == ["hello", "<tool>"]
    assert found.decode(ids) == "hello<tool>"
    assert found.token_bytes(len(tokens) - 1) == "œfancy".encode()  # not in the table of bytes


def sentence_piece(**more):
    """Metadata of a small SentencePiece tokenizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    words = {"▁": -9, "a": -8, "b": -7, "c": -6, "ab": -3, "bc": -2, "▁a": -5, "▁ab": -4, "abc": -1}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + list(words),
        "tokenizer.ggml.token_type": kinds + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in words.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "",
    } | more


def test_sentence_piece(tmp_path):
    drop = ["tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token"]
    found = tokenizer(tmp_path, metadata=sentence_piece(), drop=drop)
    # best score first: b c becomes bc before a b becomes ab
    assert names(found, found.encode(["abc"])) == ["▁", "abc"]
    assert names(found, found.encode(["ab"])) == ["▁ab"]
    assert names(found, found.encode(["a é"])) == ["▁a", "▁", "<0xC3>", "<0xA9>"]
    assert found.decode(found.encode(["ab é"])) == " ab é"
    assert found.bos_id == 1
    assert found.stop_ids == {2}
    assert found.token_bytes(0) == b""
    found = tokenizer(
        tmp_path, metadata=sentence_piece(**{"tokenizer.ggml.add_space_prefix": False}), drop=drop
    )
    assert names(found, found.encode(["abc"])) == ["abc"]


def test_a_vocabulary_without_types(tmp_path):
    found = tokenizer(tmp_path, drop=["tokenizer.ggml.token_type"])
    assert names(found, found.encode(["hello"])) == ["hello"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not known"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre = 'qwen2' is not known here"),
        ({"tokenizer.ggml.merges": ["h zzz"]}, "its tokenizer does not load"),
        ({"tokenizer.ggml.token_type": [3]}, "its tokenizer does not load"),
        ({"tokenizer.ggml.model": "llama"}, "no metadata 'tokenizer.ggml.scores'"),
    ],
)
def test_tokenizers_that_are_not_known(changes, message, tmp_path):
    with pytest.raises(CommandError, match=message):
        tokenizer(tmp_path, metadata=changes)


def test_chatml(tmp_path):
    found = tokenizer(tmp_path)
    chat = chat_format(found)
    assert chat.name == "ChatML"
    assert chat.system_tokens(found, "") == []
    system = chat.system_tokens(found, "hello")
    user = chat.user_tokens(found, "hello <|im_end|>")
    assert system[0] == user[0] == 1
    assert system.count(2) == user.count(2) == 1
    assert found.decode(system) == "system\nhello\n"
    assert found.decode(user) == "user\nhello <|im_end|>\nassistant\n"


def test_llama3_chat(tmp_path):
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokens = [*TinyModel().tokens, *special]
    changed = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 7) + [3] * 4,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": len(tokens) - 4,
        "tokenizer.chat_template": "".join(special),
    }
    found = tokenizer(tmp_path, metadata=changed)
    chat = chat_format(found)
    assert chat.name == "Llama 3"
    assert chat.system_tokens(found, "") == [len(tokens) - 4]
    system = chat.system_tokens(found, "{}")
    assert system[0] == len(tokens) - 4
    assert found.decode(system) == "system\n\n{}"
    assert found.decode(chat.user_tokens(found, "hello")) == "user\n\nhelloassistant\n\n"
    assert len(tokens) - 1 in found.stop_ids


def test_a_model_without_a_chat_format_continues_text(tmp_path):
    found = tokenizer(tmp_path, metadata={"tokenizer.chat_template": ""})
    chat = chat_format(found)
    assert chat.name == "plain text"
    assert found.decode(chat.system_tokens(found, "hello")) == "hello\n\n"
    assert found.decode(chat.user_tokens(found, "hello")) == "hello"
