"""Measure the memory that loading an FM and cutting its sub-FM takes.

python -m benchmarks.memory [--layers N] [--hidden D] [--keep FRACTION] [--dtype NAME]

Writes a random Llama of that size in several files, then loads and cuts it. Memory is
what the process itself holds (RssAnon of Linux, sampled), without what it had before;
pages of the files, which the system can drop at any time, are not in it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import parser, run_main
from fedpft_flower.architectures import ffns_of, layers_of
from fedpft_flower.config import SubFMConfig
from fedpft_flower.foundation import load_fm
from fedpft_flower.planners import keep_salient, size_of
from fedpft_flower.sub_fm import build_sub_fm

MB, SAMPLE_SECONDS = 1e6, 0.002
WORDS = 8000


def main() -> None:
    """Print sizes, the peak of each step, and its ratio to what must be held."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--hidden", type=int, default=1024)
    arguments.add_argument("--keep", type=float, default=0.5)
    arguments.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"]
    )
    options = arguments.parse_args()
    with TemporaryDirectory() as directory:
        write(Path(directory), options.layers, options.hidden, options.dtype)
        print(measured(directory, options.keep))


def write(place: Path, layers: int, hidden: int, dtype: str) -> None:
    """Write a random Llama with a tokenizer."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(place, max_shard_size="200MB")
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *map(str, range(99))])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    ).save_pretrained(place)


def measured(directory: str, keep: float) -> str:
    """Return a table of the peak memory of loading and cutting."""
    with peak() as loading:
        fm = load_fm(directory, (), "text", 0, objective="generate").model
    ffns = ffns_of(fm)
    scores = [torch.rand(ffn.width) for ffn in ffns]
    sizes = list(map(size_of, layers_of(fm), ffns))
    plan = keep_salient(scores, sizes, SubFMConfig(keep_fraction=keep))
    with peak() as cutting:
        sub_fm = build_sub_fm(fm, plan, "generate")
    fm_size, sub_size = bytes_of(fm), bytes_of(sub_fm)
    layer = bytes_of(layers_of(fm)[0])
    held = fm_size + sub_size + layer
    total = fm_size + cutting[0]
    return "\n".join(
        [
            "| what | MB | ratio |",
            "|---|---|---|",
            f"| FM ({fm.dtype}) | {fm_size / MB:.0f} | |",
            f"| sub-FM ({sub_fm.dtype}) | {sub_size / MB:.0f} | |",
            f"| a layer of the FM | {layer / MB:.0f} | |",
            f"| peak of loading, by the FM | {loading[0] / MB:.0f} | "
            f"{loading[0] / fm_size:.2f} |",
            f"| peak of cutting beside the FM, by the sub-FM | {cutting[0] / MB:.0f} | "
            f"{cutting[0] / sub_size:.2f} |",
            f"| both, by FM + sub-FM + a layer | {total / MB:.0f} | "
            f"{total / held:.2f} |",
        ]
    )


def bytes_of(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextmanager
def peak() -> Iterator[list[int]]:
    """Collect, in one entry, by how many bytes this process grew at most."""
    before, highest, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], anonymous() - before)
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()
        highest[0] = max(highest[0], anonymous() - before)


def anonymous() -> int:
    """Return the bytes of memory that this process holds and no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this needs Linux")


if __name__ == "__main__":
    run_main(main)
