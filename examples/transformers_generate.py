"""Transformers on a paged cache: a batch of prompts, then beams and a second prompt that share it.

python examples/transformers_generate.py

Needs the extra ``transformers``. The model is the demo's, SmolLM2-135M-Instruct (98 MB), which is
fetched once.
"""

import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from transformers.generation import GenerationMixin

from rocmforge.cli.model_files import fetch
from rocmforge.integrations.transformers import PagedCache, register

register()
logging.disable_progress_bar()
path = fetch()
gguf = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
model = AutoModelForCausalLM.from_pretrained(
    **gguf, dtype=torch.float32, attn_implementation="rocmforge"
)
tokenizer = AutoTokenizer.from_pretrained(**gguf)
tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
# generate's name for a cache: past_key_values, and cache in newer releases
names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in names else "past_key_values"


def generate(cache: PagedCache, inputs: dict[str, torch.Tensor], **options: object) -> list[str]:
    """What the model says next, greedily unless options say otherwise."""
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, **{CACHE: cache}, **options)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


def used(cache: PagedCache) -> int:
    return cache.kv_cache.stats().used_blocks


# Rows of different lengths: what is padding takes no room.
cache = PagedCache(model.config, num_blocks=256)
inputs = tokenizer(
    ["The capital of France is", "Water boils at a temperature of"],
    padding=True,
    return_tensors="pt",
)
for text in generate(cache, inputs):
    print("batch:", repr(text))
print(used(cache), "blocks for", cache.get_seq_length(), "columns of 2 rows")

# Beams share all blocks but those where they differ.
cache.reset()
prompt = tokenizer("A short list of the things one needs to bake bread: " * 4, return_tensors="pt")
print("beams:", repr(generate(cache, prompt, num_beams=4)[0]))
print(used(cache), "blocks for 4 beams of", cache.get_seq_length(), "tokens")

# Prompts that begin alike: the second computes what the first did not.
cache.reset()
system = "Every question below has one short answer.\n" * 6
for question in ("Q: What is the capital of Italy?\nA:", "Q: Who wrote Hamlet?\nA:"):
    one = cache.new()
    prompt = tokenizer(system + question, return_tensors="pt")
    found = one.start(**prompt)
    print(f"{found} of {prompt['input_ids'].shape[1]} tokens were cached:", generate(one, prompt))
