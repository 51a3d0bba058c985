"""The closed sets of names that profiles, files and stages use. An unknown value raises."""

from enum import StrEnum

METRICS = "metrics.jsonl"  # what was observed while training: a record with times, not part of an artifact's content


class Stage(StrEnum):
    """The stages of a fine-tune in their order; `PRETRAIN` makes a base and stands before them."""

    PRETRAIN = "pretrain"
    TOKENIZE = "tokenize"
    QUANTIZE = "quantize"
    ATTACH_LORA = "attach_lora"
    TRAIN = "train"
    CHECKPOINT = "checkpoint"
    EVALUATE = "evaluate"


class RunState(StrEnum):
    """How a run stands. `NOTHING_NEW`: it found nothing to train on and is done; `DIED`: nobody could say more."""

    GOING = "going"
    DONE = "done"
    NOTHING_NEW = "nothing new"
    FAILED = "failed"
    STOPPED = "stopped"
    DIED = "died"


class Decision(StrEnum):
    """What became of a release: by the gate, or by hand."""

    PROMOTED = "promoted"
    KEPT_ASIDE = "kept aside"
    ROLLED_BACK = "rolled back to"


class Event(StrEnum):
    """What a notification is about."""

    FAILURE = "failure"
    PROMOTION = "promotion"
    KEPT_ASIDE = "kept_aside"


class Fault(StrEnum):
    """Why a process that trains ended without a result."""

    MEMORY = "out of memory"
    GPU = "GPU fault"
    KILLED = "killed"
    CRASHED = "crashed"


class Hidden(StrEnum):
    """What an expert does between its layers; the gated ones with two halves of the first one's output, act(a) * b."""

    RELU = "relu"
    SWIGLU = "swiglu"
    GEGLU = "geglu"

    @property
    def gated(self) -> bool:
        return self is not Hidden.RELU


class Gate(StrEnum):
    """What weighs an expert's output: a softmax over the chosen, or each one's own sigmoid, the router with a bias."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class FinalNorm(StrEnum):
    """What stands before the head."""

    RMS = "rms"
    LAYER = "layer"  # with mean and bias


class LayerKind(StrEnum):
    """What the mixer of a layer is."""

    MAMBA = "mamba"
    MOE = "moe"


class BaseSource(StrEnum):
    """Where the base weights come from."""

    SEEDED = "seeded"  # initial weights from a seed: for tests of scale
    PRETRAIN = "pretrain"  # trained here, by the profile's [pretrain] section
    FOLDER = "folder"  # a model folder on disk


class DataFormat(StrEnum):
    """How a row of data becomes a document."""

    TEXT = "text"
    COMPLETIONS = "completions"
    CHAT = "chat"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    PREFERENCE = "preference"  # pairs: of text, or of conversations

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations."""
        return self not in (DataFormat.TEXT, DataFormat.COMPLETIONS, DataFormat.PREFERENCE)


class DataRender(StrEnum):
    """What becomes of JSON records in prompts."""

    JSON = "json"  # they stay as they stand
    TOON = "toon"


class Compute(StrEnum):
    """Number format of activations and matrix products; `AUTO` is float32 on a CPU, bfloat16 on a GPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Objective(StrEnum):
    """What a fine-tune learns from."""

    SFT = "sft"  # what is to be said
    DPO = "dpo"  # which of two answers is better


class LossKind(StrEnum):
    """What training minimises."""

    CROSS_ENTROPY = "cross_entropy"
    RENYI = "renyi"  # less a share of the Renyi entropy of the predicted distribution


class StateDtype(StrEnum):
    """Number format of the optimiser's two moments."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class Recompute(StrEnum):
    """Whether a layer's intermediates are made again in the backward pass instead of being kept; `AUTO` is always on a
    GPU, and on a CPU where keeping them would take the run beyond a quarter of the machine's memory.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class LoraTarget(StrEnum):
    """The projections that can carry an adapter."""

    IN_PROJ = "in_proj"
    X_PROJ = "x_proj"
    DT_PROJ = "dt_proj"
    OUT_PROJ = "out_proj"
    W1 = "w1"
    W2 = "w2"
    HEAD = "head"  # tied with the embedding: one adapter serves both


class LoraKind(StrEnum):
    """What an adapter does to a weight."""

    LORA = "lora"  # W + s B A
    DORA = "dora"  # the same, each row scaled to a length of its own, which trains


class LoraInit(StrEnum):
    """How an adapter starts."""

    ZERO = "zero"  # A random, B zero: the model is the quantised base's
    LOFTQ = "loftq"  # from what quantising lost: the model is nearer to the base in 16 bits
