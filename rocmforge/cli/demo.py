"""``rocmforge demo``: a real model answers questions through the paged cache."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rocmforge.cli.console import CommandError, Progress, not_negative, positive

if TYPE_CHECKING:
    from rocmforge.cli.gguf_llama import LlamaWeights
    from rocmforge.cli.tokenizer import Tokenizer

__all__ = ["add_arguments", "run"]

SYSTEM_PROMPT = (
    "You are a helpful AI assistant named SmolLM. Answer the user's question clearly and "
    "correctly, in two or three short sentences. Use plain words, give one concrete example where "
    "it helps, and do not repeat the question. If you do not know the answer, say so instead of "
    "inventing one."
)
QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France, and what is it known for?",
    "How does a bicycle stay upright?",
    "Give me one tip for learning to cook.",
)
DTYPES = ("float32", "float16", "bfloat16")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number from 0 up is needed, not {text!r}")
    return value


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty prompt cannot be answered")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a Llama-architecture GGUF file (default: SmolLM2-135M-Instruct, downloaded once)",
    )
    parser.add_argument(
        "--prompt",
        type=_prompt,
        action="append",
        metavar="TEXT",
        help="a question; give it again for more in the same batch (default: four questions)",
    )
    parser.add_argument(
        "--system",
        default=SYSTEM_PROMPT,
        metavar="TEXT",
        help="the system prompt that all questions share; empty for none",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="cut answers here (64)"
    )
    parser.add_argument(
        "--block-size", type=positive, default=16, metavar="N", help="tokens a block (16)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of keys and values in the cache (bfloat16; with --check float32)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where the cache is and attention runs: cpu, hip:0, auto (cpu; the rest is NumPy)",
    )
    parser.add_argument(
        "--seed",
        type=not_negative,
        metavar="N",
        help="choose tokens at random, the same way for the same seed (default: the likeliest)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="how freely tokens are chosen at random, 0 is not at all (0.7 with --seed, else 0)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every logit with dense attention in float64; exit 1 if they differ too much",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; give its exit status."""
    try:
        import gguf  # noqa: F401
        import tokenizers  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the demo needs the package {error.name!r}, which is not installed; "
            'install what it needs with: pip install "rocmforge[demo]"'
        ) from error
    from rocmforge.cli.chat import chat_format
    from rocmforge.cli.generate import Sampling, generate
    from rocmforge.cli.linear import Threads
    from rocmforge.cli.llama import Llama
    from rocmforge.cli.model_files import fetch
    from rocmforge.cli.report import format_report, measure_reading
    from rocmforge.cli.streaming import make_display
    from rocmforge.cli.tokenizer import Detokenizer
    from rocmforge.ops import get_num_threads

    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.seed is None else 0.7
    dtype = options.dtype or ("float32" if options.check else "bfloat16")
    prompts = options.prompt or list(QUESTIONS)

    weights, tokenizer = _load(options.model or fetch())
    chat = chat_format(tokenizer)
    system = chat.system_tokens(tokenizer, options.system)
    questions = [chat.user_tokens(tokenizer, prompt) for prompt in prompts]
    longest = len(system) + max(map(len, questions)) + options.max_new_tokens
    if longest > weights.config.context_length:
        raise CommandError(
            f"the longest prompt and --max-new-tokens {options.max_new_tokens} make {longest} "
            f"tokens; the model takes {weights.config.context_length}"
        )

    out = sys.stdout
    out.write(f"{weights.config.name}: {len(prompts)} questions in one batch\n\n")
    display = make_display(out, prompts)
    detokenizers = [Detokenizer(tokenizer) for _ in prompts]

    def on_end(index: int) -> None:
        display.feed(index, detokenizers[index].finish())
        display.end(index)

    threads = Threads(get_num_threads())
    try:
        result = generate(
            Llama(weights, threads),
            system,
            questions,
            max_new_tokens=options.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            block_size=options.block_size,
            dtype=dtype,
            device=options.device,
            sampling=Sampling(temperature, options.seed or 0),
            keep_logits=options.check,
            on_token=lambda index, token: display.feed(index, detokenizers[index].feed(token)),
            on_end=on_end,
        )
        reading = measure_reading(weights.matrices(), threads)
    finally:
        threads.close()
    out.write(format_report(result, reading, dtype) + "\n")
    if not options.check:
        return 0

    from rocmforge.cli.dense_check import check

    out.flush()
    found = check(weights, result.answers, dtype)
    out.write(
        f"\ncheck     {found.num_tokens} tokens again with dense attention in float64\n"
        f"          largest difference of a logit {found.largest_difference:.3g}, "
        f"limit for {dtype} {found.limit:g}\n"
        f"          likeliest token the same at {found.num_equal} of {found.num_tokens}"
        + (f", within the limit of a tie at {found.num_close}" if found.num_close else "")
        + f"\n          {'passed' if found.passed else 'FAILED'}\n"
    )
    return 0 if found.passed else 1


def _load(path: Path) -> "tuple[LlamaWeights, Tokenizer]":
    from rocmforge.cli.gguf_file import GGUFFile
    from rocmforge.cli.gguf_llama import load_llama
    from rocmforge.cli.tokenizer import Tokenizer

    file = GGUFFile(path)
    layers = file.integer("llama.block_count", 1)  # what is wrong with it, load_llama says
    with Progress(f"loading {path.name}", max(layers, 1)) as progress:
        return load_llama(file, progress.update), Tokenizer(file)
