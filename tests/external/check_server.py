"""Ask a served model by the openai client: 200 requests of 8 clients, among clients that leave and send garbage.

    python -m tests.external.check_server [--backend mlx|jax] [--requests N]

Starts `moezoo serve` on a tiny model. Every text has to be that of `generate`, every garbage an error in OpenAI's
format, and no request may be lost. After each round, threads and memory of the server are read from /proc; the last
round may not have more threads than the middle one (JAX compiles before that), nor 5% more memory. Then SIGINT has to
end it with status 0. Needs moezoo[serve] and `openai`, on Linux. Prints a Markdown table; fails if something differs.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

import moezoo
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fixtures import write_checkpoint

CLIENTS, ROUNDS = 8, 5
PROMPTS = ("the cat", "the owl saw", "and the dog", "the mat", "to the owl")
GARBAGE = (b"", b"{", b"\xff\xfe", b"[]", b'{"prompt": 3}', b'{"prompt": "a", "max_tokens": 1e9}', b"[" * 100_000)


class Served:
    """The server's process, and clients for it."""

    def __init__(self, folder: Path, backend: str) -> None:
        words = ["serve", str(folder), "--backend", backend, "--port", "0"]
        command = [sys.executable, "-m", "moezoo", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, line
        self.port = int(found[1])
        self.client = openai.OpenAI(base_url=found[0], api_key="none", max_retries=0)

    def status(self) -> tuple[int, float]:
        """Return threads, and resident memory in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        numbers = {name: int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("Threads", "VmRSS")}  # type: ignore
        return numbers["Threads"], numbers["VmRSS"] / 1024

    def raw(self, body: bytes, *, wait_bytes: int | None = None) -> bytes:
        """Send a request by a bare socket; leave after so many bytes of the response, or read all of it."""
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as link:
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if wait_bytes is not None:
                return link.recv(wait_bytes) if wait_bytes else b""
            received = b""
            while part := link.recv(1 << 16):
                received += part
            return received


def ask(served: Served, number: int, expected: dict[str, Any]) -> str:
    """Send one request of a kind that the number selects; return the kind, or what was wrong."""
    prompt, kind = PROMPTS[number % len(PROMPTS)], number % 7
    told: dict[str, Any] = {"model": "mixtral", "temperature": 0, "max_tokens": 24}
    if kind == 0:
        made = served.client.completions.create(prompt=prompt, **told)
        return "text" if made.choices[0].text == expected[prompt] else "WRONG TEXT"
    if kind == 1:
        chunks = list(served.client.completions.create(prompt=prompt, stream=True, **told))
        return "stream" if "".join(chunk.choices[0].text for chunk in chunks) == expected[prompt] else "WRONG STREAM"
    if kind == 2:
        said = served.client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **told)
        return "chat" if said.choices[0].message.content == expected[f"chat {prompt}"] else "WRONG CHAT"
    long = {"prompt": prompt, "temperature": 0, "max_tokens": 4000}
    if kind == 3:
        served.raw(json.dumps({**long, "stream": True}).encode(), wait_bytes=300)
        return "left a stream"
    if kind == 4:
        served.raw(json.dumps(long).encode(), wait_bytes=0)
        return "left at once"
    if kind == 5:
        asked = {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 1}
        chunks = [chunk.choices[0] for chunk in served.client.chat.completions.create(**asked, stream=True, **told)]
        said = "".join(choice.delta.content or "" for choice in chunks)
        scored = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
        greedy = all(entry.logprob == entry.top_logprobs[0].logprob for entry in scored)
        right = said == expected[f"chat {prompt}"] and len(scored) == expected[f"tokens {prompt}"] and greedy
        return "logprobs stream" if right else "WRONG LOGPROBS"
    answer = served.raw(GARBAGE[number // 7 % len(GARBAGE)])
    status, body = answer.split(b" ", 2)[1], answer.partition(b"\r\n\r\n")[2]
    return "garbage" if status == b"400" and "message" in json.loads(body)["error"] else f"WRONG ERROR {answer!r:.80}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--requests", type=int, default=200, help="requests of a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = write_tokenizer(write_checkpoint("mixtral", Path(made) / "mixtral"))
        model = moezoo.load(folder, backend=options.backend)
        told: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 24}
        expected: dict[str, Any] = {prompt: model.generate(prompt, **told) for prompt in PROMPTS}
        expected |= {f"chat {prompt}": model.chat(prompt, **told) for prompt in PROMPTS}
        for prompt in PROMPTS:
            ids = model.generate(model.encode_prompt(prompt, chat=True)[None], chat=True, **told)
            expected[f"tokens {prompt}"] = ids.shape[1]
        served = Served(folder, options.backend)
        try:
            return check(served, expected, options.requests)
        finally:
            served.process.kill()


def check(served: Served, expected: dict[str, Any], requests: int) -> int:
    """Do the rounds, print the table, and stop the server; return the exit status."""
    print("| round | answers | seconds | threads | MiB |\n|---|---|---|---|---|")
    states, wrong = [], 0
    for number in range(ROUNDS):
        start = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            seen = Counter(clients.map(lambda each: ask(served, each, expected), range(requests)))
        time.sleep(1.0)  # threads of closed connections end
        states.append(served.status())
        wrong += sum(count for kind, count in seen.items() if kind.startswith("WRONG"))
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(seen.items()))
        print(f"| {number + 1} | {shown} | {time.monotonic() - start:.1f} | {states[-1][0]} | {states[-1][1]:.0f} |")
    os.kill(served.process.pid, signal.SIGINT)
    start, status = time.monotonic(), served.process.wait(20)
    print(f"\nSIGINT: status {status} after {time.monotonic() - start:.1f} s")
    (threads, memory), (last_threads, last_memory) = states[ROUNDS // 2], states[-1]
    grown = last_threads > threads or last_memory > 1.05 * memory
    return int(bool(wrong) or grown or status != 0)


if __name__ == "__main__":
    sys.exit(main())
