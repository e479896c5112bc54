"""Read the run configuration once, at the door, and refuse what makes no sense.

A `Config` is made of frozen dataclasses; its keys in TOML are the field names in
kebab-case, with the section as prefix (`train.local-epochs`). The defaults here and in
`pyproject.toml` are the embedded example, and a test keeps the two equal.
"""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast, get_type_hints

# What an alignment before training is made of.
ALIGNMENTS = ("bias", "least-squares", "distill")

Modality = Literal["text", "image"]
Objective = Literal["classify", "generate"]
Scalar = bool | int | float | str
Row = TypeVar("Row")

# Settings that may name places: what is read there, and where results are.
READ_PATHS = ("fm.name", "data.path", "data.public-path")
WRITTEN_PATHS = ("out-dir", "resume")

# Lines for people start with this in a run's stream; `fedpft-run` shows only these.
MARK = "[fedpft] "

LONGEST = 1000  # characters of an error's line


class FedPFTError(Exception):
    """Report a mistake that its reader can mend, in one line.

    The text names the thing, the value, and the remedy.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class OwnRowsError(FedPFTError):
    """Report what quotes rows or the names of their files.

    Whoever owns the rows reads it in full; `told` is what a node says to the server.
    """

    def __init__(self, text: str, told: str) -> None:
        super().__init__(text)
        self.told = told


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    return one_line((str(error).strip() or repr(error)).splitlines()[0])


def one_line(text: str) -> str:
    """Return text as one line that a terminal can show; of a long one, both ends."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    half = LONGEST // 2 - 3
    return shown if len(shown) <= LONGEST else f"{shown[:half]} ... {shown[-half:]}"


@dataclass(frozen=True)
class FMConfig:
    """Say which foundation model the server owns."""

    # "minilm" (bundled with the extra `offline`), a local directory, or a hub name.
    name: str = "minilm"
    # The numbers that the server holds it in: those of its "checkpoint", "float32", or
    # "bfloat16". A float16 checkpoint becomes float32, since gradients would underflow.
    # The sub-FM and all adapters are float32.
    dtype: str = "checkpoint"


@dataclass(frozen=True)
class DataConfig:
    """Say which rows are learnt from, and which public rows align the sub-FM."""

    # "docstrings", "digits" (both embedded), or for your own data "text" / "image"
    # (classification) and "generation" (texts for a decoder).
    task: str = "docstrings"
    # A directory, file or hub name that `datasets` loads; only for your own data.
    path: str = ""
    # Which configuration of a hub data set ("sst2" of "nyu-mll/glue"), if it has many.
    subset: str = ""
    # What parts the columns of a CSV file.
    separator: str = ","
    # One column, or two: sentence pairs ("question,sentence"), or for "generation" a
    # prompt and the response that is learnt ("instruction,response").
    text_columns: str = "text"
    # How a prompt is put to a decoder; "chat" takes the chat template of the FM's
    # tokenizer.
    prompt_template: str = "{prompt}\n"
    image_column: str = "image"
    label_column: str = "label"
    # The label set in its order, "negative,positive"; "" takes it from the data.
    labels: str = ""
    # Whose row it is; only for partition.kind = "natural".
    client_column: str = ""
    train_split: str = "train"
    validation_split: str = "validation"
    # Several, as in "validation_matched,validation_mismatched", are reported apart; the
    # first is "the" test split.
    test_split: str = "test"
    # Seeded samples of this many rows; 0 keeps all.
    max_train_rows: int = 0
    max_validation_rows: int = 0
    max_test_rows: int = 0
    # Training rows with fewer words are left out; 0 keeps all.
    min_words: int = 0
    # Longer texts are cut, in tokens; for "generation" plain texts become several rows,
    # and prompts lose their beginning.
    max_length: int = 64
    # What training does to images: "none", or "crop-flip" (random resized crop and
    # horizontal flip).
    augment: str = "none"
    # The public corpus for alignment; "" takes the embedded task's own. Its column is
    # that of texts or images; two columns are pairs of texts.
    public_path: str = ""
    public_subset: str = ""
    public_column: str = ""
    public_split: str = "train"
    # A seeded sample of so many, streamed where it is on a hub; 0 takes all.
    public_rows: int = 4000
    # Of these the rows, drawn at random, that so many tokens make; 0 takes all. With it
    # `public-rows` may be 0: no more is fetched or tokenised than the budget needs.
    public_tokens: int = 0
    # Public texts longer than `max_length`: "cut", or made "blocks" of that length; ""
    # does what is done with the texts of the task.
    public_long: str = ""
    # What rounds are judged and shown by; all are recorded. Classification: "accuracy",
    # "macro-f1", "matthews"; generation: "perplexity", "token-accuracy", "exact-match".
    # "" is the first of these.
    metric: str = ""

    def makes_blocks(self, objective: Objective) -> bool:
        """Tell whether long public texts become several rows, for this objective."""
        own = "blocks" if objective == "generate" else "cut"
        return (self.public_long or own) == "blocks"


@dataclass(frozen=True)
class PartitionConfig:
    """Say how virtual clients share the training rows."""

    # "iid", "dirichlet" (label skew), "pathological" (few classes a client), "natural"
    # (as `data.client-column` says), or "sizes" (size skew).
    kind: str = "dirichlet"
    # Concentration of "dirichlet" and "sizes"; small means more skew.
    alpha: float = 1.0
    # Classes a client has with "pathological".
    classes: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """Say how clients are sampled and how they train."""

    # 0 means `fraction` of the nodes, at least one.
    clients_per_round: int = 0
    fraction: float = 0.25
    # Nodes that must be there before the first round, if more than `clients-per-round`.
    # For as many as nodes say (num-partitions) it waits too, `wait-seconds` at most.
    min_nodes: int = 0
    # A round needs so many usable replies; with fewer it is tried again, `max-retries`
    # times, before the run ends.
    min_replies: int = 1
    max_retries: int = 1
    # A reply whose adapter moved by more (L2 norm) is left out; 0 sets no bound.
    max_update_norm: float = 1000.0
    local_epochs: int = 1
    # When positive, this many optimiser steps take the place of `local_epochs`.
    local_steps: int = 0
    batch_size: int = 16
    # Rows that go through the model at once; 0 takes the whole batch. A step still is
    # about `batch-size` rows, whose gradients are added up: less memory, more time.
    micro_batch_size: int = 0
    # Whether the insides of layers are computed again for the gradients instead of
    # being kept: much less memory, about half as much time more.
    recompute: bool = False
    lr: float = 0.001
    # Over this share of the rounds the rate rises to `lr`; 0 begins with it.
    warmup_ratio: float = 0.0
    # From there on, "linear": it falls towards 0, which it would have after the last
    # round; "none": constant.
    lr_decay: str = "linear"
    weight_decay: float = 0.01
    # Largest L2 norm of the gradient; 0 does not clip.
    clip_norm: float = 1.0
    # Whether the frozen model's own dropout is on while its adapter trains; LoRA's
    # dropout (`lora.dropout`) always is.
    frozen_dropout: bool = False
    # How clients hold the frozen matrices while they train: "fp32", or with less memory
    # "int8" or "nf4" (4 bits), which need bitsandbytes.
    frozen: str = "fp32"
    # In which numbers clients compute products while they train: "fp32", "bf16", or
    # "auto", what is fastest on each node's machine (`compute.py`).
    precision: str = "fp32"

    @property
    def nodes_awaited(self) -> int:
        """Return for how many nodes a run waits, at least, before its first round."""
        return max(self.clients_per_round, self.min_nodes)


@dataclass(frozen=True)
class LoraConfig:
    """Shape the LoRA adapter (r, lora_alpha, dropout of PEFT)."""

    r: int = 8
    alpha: int = 48
    dropout: float = 0.1
    # How A starts (B is zero): "gaussian", as the LoRA paper has it (Hu et al. 2021,
    # section 4.1; PEFT: N(0, 1/r^2)), or "kaiming", PEFT's default, which is smaller.
    init: str = "gaussian"
    # Comma-separated module names; "" takes the attention of the architecture row.
    targets: str = ""
    # Modules that train in full, comma-separated; "" takes the head of the row.
    head: str = ""


@dataclass(frozen=True)
class SubFMConfig:
    """Say how much of each FFN the sub-FM keeps."""

    keep_fraction: float = 0.25
    # When positive, this many neurons per layer take the place of `keep_fraction`.
    keep_neurons: int = 0
    # Layers left whole, comma-separated; negative counts from the end: "0,-1".
    whole_layers: str = ""
    # How neurons are scored: "norm" (the paper's), "random" (a control), or by what
    # they do on the public corpus: "energy", "variance", "greedy". "" is the method's.
    selection: str = ""
    # Layer dropping (`fedot`) keeps this share of the parameters of all layers; 0 means
    # as many as the sub-FM above would have.
    layer_budget: float = 0.0
    # Layers at each end that layer dropping keeps and that carry its adapters.
    end_layers: int = 1


@dataclass(frozen=True)
class AlignConfig:
    """Say how the sub-FM is aligned with the FM, and how much that may cost.

    A budget ends at whichever of its positive limits comes first.
    """

    # Before the first round: "none", or steps joined by "+": "bias" and "least-squares"
    # (output biases, or output weights too, in closed form), "distill" (layer-level).
    # "" is the method's.
    before: str = ""
    # After every `every`-th round: "none", "least-squares", or "distill"
    # (neuron-level). "" is the method's.
    during: str = ""
    # Share of a public token's weight, in choosing neurons and in alignment, that is by
    # how much the FM's logits depend on it (`sensitivity.py`): below 1; 0 for none, -1
    # is the method's choice. It needs the logits of `batch-size` rows and their
    # gradient, which is much where all tokens have a large vocabulary's.
    sensitivity: float = -1.0
    # Least squares: weight of the Jacobian, ridge (both as shares), and how many public
    # tokens to look at; 0 takes 40 for each kept neuron of a layer, and to choose
    # neurons 10 for each there is, or 25 for each that is kept where those are more.
    jacobian_weight: float = 0.3
    ridge: float = 0.001
    calibration_tokens: int = 0
    # Layer-level distillation.
    steps: int = 100
    tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.001
    # It ends early when so many held-out losses in a row, each a tenth of its budget
    # behind the last, were no new best; the best weights stay. 0 holds nothing out, -1
    # is the method's choice.
    patience: int = -1
    # MB for the FM's hidden states of public rows: what is kept is not computed again.
    # 0 keeps none, but of rows held out (some MB, 256 at most).
    memory_mb: float = 0.0
    # Alignment during training, and neuron-level distillation.
    every: int = 5
    during_steps: int = 20
    during_tokens: int = 0
    during_seconds: float = 0.0
    during_lr: float = 0.0005
    # Share of each FFN's kept neurons that neuron-level distillation may change.
    proportion: float = 0.5
    batch_size: int = 16
    # Weight of the product term (the paper's alpha).
    product_weight: float = 0.01
    # Who measures activity: "clients" on their data, "public" the server's corpus.
    activity: str = "clients"
    # Inactive: |a| <= threshold * RMS of that neuron on the public corpus.
    inactive_threshold: float = 0.01


@dataclass(frozen=True)
class PlugInConfig:
    """Say how the adapter is refined in the FM without labels, after the last round."""

    # Steps; 0 leaves the adapter as it was averaged, -1 is the method's choice.
    steps: int = -1
    lr: float = 0.0005
    batch_size: int = 32
    # How many of its batches, as a share, are inputs of the server's validation rows
    # instead, whose labels are not looked at: 0 for none, -1 is the method's choice.
    # (Texts to generate hold what is right, and are left out.)
    validation_share: float = -1.0


@dataclass(frozen=True)
class WireConfig:
    """Say in how many bits tensors travel."""

    # Frozen weights of the sub-FM: "fp32", "bf16", "fp16", or "int8" (matrices, with
    # a scale a row). Clients train on what arrives.
    frozen: str = "fp32"
    # Adapters, both ways: "fp32", "bf16" or "fp16". They are averaged in float32.
    adapter: str = "fp32"


@dataclass(frozen=True)
class PrivacyConfig:
    """Say with which differential privacy averaged adapters are released."""

    # Where updates are clipped: "none" gives no guarantee at all; "server", or "client"
    # before they leave it. The server adds the noise in both.
    mechanism: str = "none"
    # Standard deviation of the noise in the sum of a round's updates, as a multiple of
    # `clipping_norm`.
    noise_multiplier: float = 0.0
    # Largest L2 norm of a client's update, over all of its tensors together.
    clipping_norm: float = 0.0
    # Of (epsilon, delta); less than 1 / nodes, of those at the start.
    delta: float = 1e-5
    # The run ends before the round whose release would exceed it; 0 sets no bound.
    max_epsilon: float = 0.0

    @property
    def on(self) -> bool:
        """Tell whether anything is guaranteed."""
        return self.mechanism != "none"


@dataclass(frozen=True)
class CheckpointConfig:
    """Say which checkpoints stay on the server's disk."""

    # The newest so many, and the best round's.
    keep: int = 2


@dataclass(frozen=True)
class Config:
    """Hold everything a run depends on."""

    method: str = "fedpft-ls"
    # What averages the adapters: a strategy of `flwr.serverapp.strategy`, by name, and
    # its arguments as one JSON object: '{"eta": 0.01}'.
    strategy: str = "FedAvg"
    strategy_args: str = ""
    # What a client counts in averages: as many as its "examples", or all the same
    # ("uniform"; nobody then tells how many rows it has when it replies).
    weighting: str = "examples"
    rounds: int = 10
    seed: int = 0
    # Where run directories go; relative paths start at the home directory, with
    # `fedpft-run` at the shell's. The default gives way to the variable FEDPFT_OUT.
    out_dir: str = "fedpft-runs"
    # Evaluate after every so many rounds (and after the last one).
    eval_every: int = 1
    # Measure the sub-FM's gradient error after every so many rounds; 0 does it only
    # before and after an alignment.
    gradient_every: int = 0
    # Threads of the server's process; 0 leaves PyTorch's default.
    server_threads: int = 0
    # In which numbers the server computes products while it aligns and refines, as
    # `train.precision`; evaluations and gradient errors stay as the models are.
    server_precision: str = "fp32"
    # How long the server waits for nodes to come online, and for their greeting, for
    # which it is 300 s at least.
    wait_seconds: float = 60.0
    # How long the server waits for replies: the deadline of every exchange.
    timeout_seconds: float = 3600.0
    # A run directory to continue; it needs that run's configuration.
    resume: str = ""
    # End after so many evaluations without a better one on validation; 0 never does.
    early_stop: int = 0
    # Which round's adapter is the result: "last", or "best" on validation.
    select: str = "last"
    fm: FMConfig = field(default_factory=FMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sub_fm: SubFMConfig = field(default_factory=SubFMConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    plug_in: PlugInConfig = field(default_factory=PlugInConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Check every value that can be checked without model and data.

        Raises:
            FedPFTError: a value is out of its range.
        """
        for problem in _problems(self):
            raise FedPFTError(problem)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> "Config":
        """Build a Config from flat keys such as `train.local-epochs`.

        Raises:
            FedPFTError: an unknown key, a wrong type, or a value out of range.
        """
        known = flat_defaults()
        for key in run_config:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "see pyproject.toml"
                raise FedPFTError(f"unknown configuration key {key!r}; {hint}")
        config: Config = _build(cls, "", run_config)
        return config

    def flat(self) -> dict[str, Scalar]:
        """Return the flat keys and values that `from_run_config` reads."""
        return {_kebab(key): value for key, value in flatten(asdict(self)).items()}


def flat_defaults() -> dict[str, Scalar]:
    """Return every configuration key with its default."""
    return Config().flat()


def nest(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """Turn dotted keys into nested tables, for TOML."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tables


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested TOML tables into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive an independent 63-bit seed for one named purpose of a run."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def row_called(name: str, rows: Mapping[str, Row], key: str) -> Row:
    """Return the row of a table that a setting names.

    Raises:
        FedPFTError: there is no such row.
    """
    if name not in rows:
        raise FedPFTError(f"{key} = {name!r}; choose one of {', '.join(rows)}")
    return rows[name]


def names_in(text: str) -> tuple[str, ...]:
    """Split a comma-separated value into its stripped, non-empty names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _build(cls: type[Any], prefix: str, flat: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in fields(cls):
        key, kind = prefix + _kebab(item.name), hints[item.name]
        if is_dataclass(kind):
            values[item.name] = _build(cast(type[Any], kind), f"{key}.", flat)
        elif key in flat:
            values[item.name] = _typed(key, flat[key], kind)
    return cls(**values)


def _typed(key: str, value: Any, kind: type) -> Any:
    if type(value) is int and not -(2**63) <= value < 2**63:  # as in TOML
        raise FedPFTError(
            f"{key} is a number of {value.bit_length()} bits; give one of at most 64"
        )
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise FedPFTError(
            f"{key} = {value!r} is {type(value).__name__}; give a {kind.__name__}"
        )
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise FedPFTError(
            f"{key} = {value!r} has a character that no file can have in its name or "
            "text; leave it out"
        )
    return value


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


# The smallest and largest value, and whether the smallest itself is allowed.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "rounds": (1, 1e6, True),
    "seed": (0, 2**53, True),
    "eval-every": (1, 1e6, True),
    "gradient-every": (0, 1e6, True),
    "server-threads": (0, 4096, True),
    "timeout-seconds": (0, 1e9, False),
    "early-stop": (0, 1e6, True),
    "checkpoint.keep": (1, 1e6, True),
    "wait-seconds": (0, 1e9, True),
    "data.max-train-rows": (0, 1e12, True),
    "data.max-validation-rows": (0, 1e12, True),
    "data.max-test-rows": (0, 1e12, True),
    "data.min-words": (0, 1e6, True),
    "data.max-length": (2, 1e6, True),
    "data.public-rows": (0, 1e12, True),
    "data.public-tokens": (0, 1e15, True),
    "partition.classes": (1, 1e6, True),
    "partition.alpha": (0, 1e9, False),
    "train.clients-per-round": (0, 1e9, True),
    "train.min-nodes": (0, 1e9, True),
    "train.min-replies": (1, 1e9, True),
    "train.max-retries": (0, 1e6, True),
    "train.max-update-norm": (0, 1e30, True),
    "train.fraction": (0, 1, False),
    "train.local-epochs": (1, 1e6, True),
    "train.local-steps": (0, 1e9, True),
    "train.batch-size": (1, 1e6, True),
    "train.micro-batch-size": (0, 1e6, True),
    "train.lr": (0, 1e3, False),
    "train.warmup-ratio": (0, 0.9, True),
    "train.weight-decay": (0, 1e3, True),
    "train.clip-norm": (0, 1e9, True),
    "lora.r": (1, 4096, True),
    "lora.alpha": (0, 1e6, False),
    "lora.dropout": (0, 0.95, True),
    "sub-fm.keep-fraction": (0, 1, False),
    "sub-fm.keep-neurons": (0, 1e9, True),
    "sub-fm.layer-budget": (0, 1, True),
    "sub-fm.end-layers": (1, 1e6, True),
    "align.patience": (-1, 1e6, True),
    "align.sensitivity": (-1, 0.999, True),
    "align.memory-mb": (0, 1e9, True),
    "align.jacobian-weight": (0, 1e6, True),
    "align.ridge": (1e-9, 1e6, True),
    "align.calibration-tokens": (0, 1e12, True),
    "align.steps": (0, 1e9, True),
    "align.tokens": (0, 1e15, True),
    "align.seconds": (0, 1e9, True),
    "align.lr": (0, 1e3, False),
    "align.every": (1, 1e6, True),
    "align.during-steps": (0, 1e9, True),
    "align.during-tokens": (0, 1e15, True),
    "align.during-seconds": (0, 1e9, True),
    "align.during-lr": (0, 1e3, False),
    "align.proportion": (0, 1, False),
    "align.batch-size": (1, 1e6, True),
    "align.product-weight": (0, 1e9, True),
    "align.inactive-threshold": (0, 1e3, True),
    "plug-in.steps": (-1, 1e9, True),
    "plug-in.lr": (0, 1e3, False),
    "plug-in.batch-size": (1, 1e6, True),
    "plug-in.validation-share": (-1, 1, True),
    "privacy.noise-multiplier": (0, 1e6, True),
    "privacy.clipping-norm": (0, 1e6, True),
    "privacy.delta": (0, 0.1, False),
    "privacy.max-epsilon": (0, 1e9, True),
}

PRECISIONS = ("fp32", "bf16", "auto")

_CHOICES: dict[str, tuple[str, ...]] = {
    "select": ("last", "best"),
    "weighting": ("examples", "uniform"),
    "privacy.mechanism": ("none", "server", "client"),
    "wire.frozen": ("fp32", "bf16", "fp16", "int8"),
    "wire.adapter": ("fp32", "bf16", "fp16"),
    "fm.dtype": ("checkpoint", "float32", "bfloat16"),
    "data.augment": ("none", "crop-flip"),
    "data.public-long": ("", "cut", "blocks"),
    "partition.kind": ("iid", "dirichlet", "pathological", "natural", "sizes"),
    "train.frozen": ("fp32", "int8", "nf4"),
    "train.precision": PRECISIONS,
    "server-precision": PRECISIONS,
    "train.lr-decay": ("linear", "none"),
    "lora.init": ("gaussian", "kaiming"),
    "align.activity": ("clients", "public"),
    "align.during": ("", "none", "least-squares", "distill"),
}


def outside(
    name: str, value: float, low: float, high: float, closed: tuple[bool, bool]
) -> Iterator[str]:
    """Yield what is wrong with a value that is not in a range.

    Args:
        name: whose value it is.
        value: a number, or NaN, which is in no range.
        low: the smallest.
        high: the largest.
        closed: whether these two are allowed themselves.
    """
    above = low <= value if closed[0] else low < value
    below = value <= high if closed[1] else value < high
    if not (above and below):
        begin, end = "[" if closed[0] else "(", "]" if closed[1] else ")"
        yield f"{name} = {value!r} is outside {begin}{low:g}, {high:g}{end}"


def _problems(config: Config) -> Iterator[str]:
    flat = config.flat()
    for key, (low, high, closed) in _RANGES.items():
        value = flat[key]
        assert isinstance(value, int | float)
        yield from outside(key, value, low, high, (closed, True))
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            yield f"{key} = {flat[key]!r}; choose one of {', '.join(choices)}"
    if not config.fm.name.strip():
        yield "fm.name is empty; give a directory, a hub name, or 'minilm'"
    for when in ("", "during-"):
        keys = [f"align.{when}{limit}" for limit in ("steps", "tokens", "seconds")]
        if not any(flat[key] for key in keys):
            yield f"{', '.join(keys)} are all 0; give at least one a positive budget"
    share = config.align.sensitivity
    if -1 < share < 0:
        yield f"align.sensitivity = {share:g}; give 0 to 0.999, or -1"
    share = config.plug_in.validation_share
    if -1 < share < 0:
        yield f"plug-in.validation-share = {share:g}; give 0 to 1, or -1"
    steps = config.align.before.split("+")
    known, twice = set(steps) <= set(ALIGNMENTS), len(set(steps)) < len(steps)
    if config.align.before not in ("", "none") and (twice or not known):
        yield (
            f"align.before = {config.align.before!r}; choose 'none', or steps of "
            f"{', '.join(ALIGNMENTS)}, each once, joined by '+'"
        )
    template = config.data.prompt_template
    if template != "chat" and template.count("{prompt}") != 1:
        yield (
            f"data.prompt-template = {template!r} does not say once where the prompt "
            "is; write '{prompt}' there, or 'chat'"
        )
    for entry in names_in(config.sub_fm.whole_layers):
        if not re.fullmatch(r"-?\d{1,6}", entry):
            yield (
                f"sub-fm.whole-layers = {config.sub_fm.whole_layers!r}: {entry!r} is "
                "not a layer number; write them like '0,-1'"
            )
