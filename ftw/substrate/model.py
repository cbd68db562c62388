"""The substrate: the language model under observation, with its tokenizer and the map of its blocks.

Any decoder-only transformers model will do; its blocks are found by their number and size, not by its name. A GGUF file
(the quantised form package registries carry) is dequantised once and kept as safetensors under `$FTW_HOME/models`, so
that later starts take seconds.

Axes: B texts, T tokens, D model width.
"""

import bisect
import contextlib
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor, nn

from ftw.errors import ConfigError, SubstrateError
from ftw.paths import home, replace_folder
from ftw.substrate.sources import Fetched, fetch, hash_file, slug

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FINGERPRINT_WEIGHTS = 4096
# What decides the states besides the weights. A list of what counts, not of what does not: a new field in a later
# transformers must not change the fingerprint of an old model.
STRUCTURE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "rope_parameters", "sliding_window", "layer_types", "use_parallel_residual",
    "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "num_local_experts", "num_experts",
    "num_experts_per_tok",
)  # fmt: skip


@dataclass(kw_only=True)
class SubstrateConfig:
    """Which model, from where, in which dtype, on which device.

    Attributes:
        name: a name in `sources.lock.json`, or a repository on the Hugging Face Hub.
        path: a local folder (transformers form) or GGUF file; then `name` is only a label.
        revision: commit, tag or branch on the Hub.
        sources: addresses in the order they are tried.
        dtype: "float32", "bfloat16", "float16", or "auto" (as stored).
        device: "cpu", "cuda", "cuda:1", ..., or "auto" (CUDA where there is one).
    """

    name: str = "smollm2-135m-instruct"
    path: str | None = None
    revision: str | None = None
    sources: list[str] = field(default_factory=lambda: ["path", "package", "hub"])
    dtype: str = "float32"
    device: str = "auto"

    def build(self) -> "Substrate":
        """Fetch (once), load, check and fingerprint the model.

        Raises:
            SourceError: no address gave the model, or its bytes are not the promised ones.
            SubstrateError: the files are not a decoder-only model that transformers can load safely.
        """
        if self.dtype not in (*DTYPES, "auto"):
            raise ConfigError(f"substrate.dtype={self.dtype!r} is unknown; choose from {', '.join(DTYPES)}, auto")
        device = _choose_device(self.device)
        fetched = fetch(self.name, order=self.sources, path=self.path, revision=self.revision)
        model, tokenizer = load_folder(transformers_folder(fetched))
        # The fingerprint is taken before the cast: float16 rounds otherwise than bfloat16 and would give another one.
        fingerprint = fingerprint_model(model)
        if self.dtype != "auto":
            cast_parameters(model, DTYPES[self.dtype])
        return Substrate.from_model(model.to(device), tokenizer, name=self.name, fingerprint=fingerprint)


@dataclass(frozen=True, kw_only=True, eq=False)
class Substrate:
    """A decoder-only language model, ready to be read.

    Attributes:
        model: the transformers model, in evaluation mode, without gradients for its parameters.
        tokenizer: its tokenizer.
        name: what the user called it.
        blocks: its transformer blocks; layer i is the output of `blocks[i]` (transformers' `hidden_states[i + 1]`, of
            which the last one has been through the final norm as well).
        width: D, numbers in a state.
        context_tokens: the longest sequence it was made for.
        fingerprint: sha256 of structure and sampled weights; see `fingerprint_model`.
    """

    model: Any
    tokenizer: Any
    name: str
    blocks: nn.ModuleList
    width: int
    context_tokens: int
    fingerprint: str

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, *, name: str, fingerprint: str | None = None) -> "Substrate":
        """Wrap a loaded transformers model (which is put in evaluation mode, its parameters frozen).

        Raises:
            SubstrateError: not a decoder-only model, no blocks found, or weights that are not finite.
        """
        if getattr(model.config, "is_encoder_decoder", False):
            raise SubstrateError(f"{name!r} is an encoder-decoder; FTW reads decoder-only language models")
        config = model.config.get_text_config()
        blocks = find_blocks(model)
        model.eval().requires_grad_(False)
        fingerprint = fingerprint or fingerprint_model(model)
        _require_causal(model, name)
        context = getattr(config, "max_position_embeddings", None) or getattr(tokenizer, "model_max_length", 0)
        return cls(
            model=model,
            tokenizer=tokenizer,
            name=name,
            blocks=blocks,
            width=config.hidden_size,
            # transformers writes 1e30 for "unknown"; models without positions (Bloom, Mamba) were made with 2048.
            context_tokens=context if 0 < context < 2**31 else 2048,
            fingerprint=fingerprint,
        )

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """Dtype of the weights: "float32", "bfloat16" or "float16"."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def layers(self, spec: Sequence[float]) -> tuple[int, ...]:
        """Block indices of a list of depths, in the given order, each once.

        Args:
            spec: block indices, or fractions of the depth between 0 and 1 (exclusive): 0.3 of 30 blocks is layer 9.
        """
        found: list[int] = []
        for value in spec:
            layer = min(round(value * self.num_layers), self.num_layers - 1) if 0 < value < 1 else value
            if layer != int(layer) or not 0 <= layer < self.num_layers:
                raise SubstrateError(
                    f"substrate {self.name!r} has no layer {value} (it has 0-{self.num_layers - 1}); "
                    "give block indices or fractions of the depth such as 0.3"
                )
            if int(layer) not in found:
                found.append(int(layer))
        if not found:
            raise SubstrateError(f"no layers given; substrate {self.name!r} has 0-{self.num_layers - 1}")
        return tuple(found)

    @property
    def sink_token_id(self) -> int | None:
        """The token put first: its state is a sink of attention, so no content may stand there."""
        tokenizer = self.tokenizer
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        return next((token for token in candidates if token is not None), None)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up a batch; it is masked and never read."""
        return next(token for token in (self.tokenizer.pad_token_id, self.sink_token_id, 0) if token is not None)

    def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text, the sink token first, cut to `max_tokens` (sink included) if that is given."""
        if self.sink_token_id is None:
            raise SubstrateError(f"the tokenizer of {self.name!r} has no bos, eos, pad or unk token; set one")
        # verbose=False: the length is checked where it matters, with an error instead of a log line.
        token_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.sink_token_id, *token_ids][:max_tokens]

    def chat(self, prompt: str, *, system: str | None = None) -> list[int]:
        """Token ids of a prompt in the model's chat template, up to where its answer starts.

        A model without a template gets `encode(prompt)`, the system text in front of it.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode(f"{system}\n\n{prompt}" if system else prompt)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if token_ids[0] not in self.tokenizer.all_special_ids and self.sink_token_id is not None:
            return [self.sink_token_id, *token_ids]
        return token_ids

    def describe(self) -> str:
        """Table for people: layer, module path, shape of its states, number of parameters."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        rows = [("layer", "module", "states", "parameters")]
        for layer, block in enumerate(self.blocks):
            size = sum(parameter.numel() for parameter in block.parameters())
            rows.append((str(layer), paths[id(block)], f"[B, T, {self.width}]", f"{size:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = f"{self.name}: {self.model.config.model_type}, {self.num_layers} blocks, width {self.width}"
        tail = f"context {self.context_tokens} tokens, {self.dtype} on {self.device}"
        return "\n".join([f"{head}, {tail}", f"fingerprint {self.fingerprint}", *lines])


def load_substrate(name: str = "smollm2-135m-instruct", **options: Any) -> Substrate:
    """Load a language model by its name in the lock file, on the Hub, or from a folder (`path=`).

    Args:
        options: further fields of `SubstrateConfig`: path, revision, sources, dtype, device.
    """
    return SubstrateConfig(name=name, **options).build()


def find_blocks(model: Any) -> nn.ModuleList:
    """The list of transformer blocks: as long as the config says, and the heaviest of that length."""
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    if not lists:
        raise SubstrateError(
            f"{type(model).__name__} has no nn.ModuleList of {num_layers} blocks; FTW cannot tell where to read it"
        )
    return max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))


def fingerprint_model(model: Any) -> str:
    """Sha256 that says whether two loaded models compute the same states.

    It covers the structural fields of the config and 4096 weights at fixed places of the part below the LM head,
    rounded to bfloat16: the same model has one fingerprint in float32 and in bfloat16, with and without its head.
    Names, paths, dtypes and versions do not enter. (A model cast to float16 by hand is rounded otherwise and differs;
    `SubstrateConfig` takes the fingerprint before it casts.)

    Raises:
        SubstrateError: a sampled weight is not finite.
    """
    config = model.config.get_text_config()
    structure = {name: _plain(getattr(config, name)) for name in STRUCTURE if getattr(config, name, None) is not None}
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    parameters = sorted(model.base_model.named_parameters())
    ends, total = [], 0
    for _, parameter in parameters:
        total += parameter.numel()
        ends.append(total)
    places: dict[int, list[int]] = {}
    for draw in range(FINGERPRINT_WEIGHTS):
        # Places from a hash: no stride to fall in step with a matrix, no random stream that a library may change.
        place = int.from_bytes(hashlib.sha256(str(draw).encode()).digest()[:8]) % total
        which = bisect.bisect_right(ends, place)
        places.setdefault(which, []).append(place - ends[which] + parameters[which][1].numel())
    for which in sorted(places):
        name, parameter = parameters[which]
        values = parameter.detach().reshape(-1)[torch.tensor(sorted(places[which]), device=parameter.device)]
        if not values.isfinite().all():
            raise SubstrateError(f"{name} has weights that are not finite; the model file is damaged, fetch it again")
        digest.update(values.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def transformers_folder(fetched: Fetched) -> Path:
    """Folder that transformers can load: the fetched one, or what its GGUF file was converted to (once)."""
    source = fetched.folder
    if source.is_dir() and (source / "config.json").is_file():
        return source
    files = [source] if source.suffix == ".gguf" else sorted(source.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) if source.is_dir() else "a single file"
        raise SubstrateError(
            f"{source} holds {len(files)} GGUF files and no config.json (found: {found or 'nothing'}); "
            "give the folder of a transformers model, or one GGUF file"
        )
    sha256 = fetched.sha256.get(files[0].name) or hash_file(files[0])
    folder = home() / "models" / f"{slug(fetched.name)}-{sha256[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            with Console(file=sys.stderr).status(f"converting {files[0].name} to safetensors (once) ..."):
                convert_gguf(files[0], folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a transformers folder of float32 safetensors, whole or not at all.

    The weights are the quantised model's, bit for bit; float32 because the products scale x 4-bit integer do not fit 16
    bits. transformers' own `from_pretrained(gguf_file=...)` wants accelerate for this; the reader below it does not.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            with torch.device("meta"):  # only the names of its parameters are needed
                skeleton = AutoModelForCausalLM.from_config(config)
            with contextlib.redirect_stderr(io.StringIO()):  # it draws its bar with plain tqdm, which asks nobody
                tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=skeleton)["tensors"]
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise SubstrateError(f"{file} is not a GGUF model that transformers can read: {error}") from error
    missing = set(dict(skeleton.named_parameters())) - set(tensors)
    if missing:
        raise SubstrateError(
            f"{file} lacks {len(missing)} tensors of a {config.model_type}, such as {sorted(missing)[0]}"
        )
    config.architectures = [type(skeleton).__name__]
    config.dtype = torch.float32
    with replace_folder(folder) as unfinished:
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()},
                  unfinished / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Model (CPU, dtype as stored) and tokenizer of a transformers folder; only safetensors, never the folder's code.

    Raises:
        SubstrateError: not a causal language model, damaged or incomplete weights, or code that FTW will not run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **safe)
            if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
                raise SubstrateError(f"{folder} is a {config.model_type}, not a decoder-only language model")
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype="auto", use_safetensors=True, output_loading_info=True, **safe
            )
            model, info = loaded
    except SubstrateError:
        raise
    except Exception as error:  # a damaged file makes transformers, tokenizers and safetensors raise nearly anything
        raise SubstrateError(
            f"cannot load {folder}: {error}\n(FTW reads decoder-only models that transformers knows, as safetensors, "
            "and runs no code from a model's folder)"
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would go on with random numbers in their place.
        raise SubstrateError(
            f"{folder} lacks weights: {sorted(map(str, info['missing_keys'] or info['mismatched_keys']))[:3]}"
        )
    return model, tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and log lines off the terminal; what goes wrong still raises."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"substrate.device={device!r} is unknown; use auto, cpu, cuda or cuda:0") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"substrate.device={device!r}, but torch sees no CUDA device; use substrate.device=cpu")
    return chosen


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and nothing else: `model.to(bfloat16)` would round the rotary frequencies too."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _require_causal(model: Any, name: str) -> None:
    """Two texts that differ in their last token must agree before it, or the model looks ahead (BERT does)."""
    vocab = model.config.get_text_config().vocab_size
    token_ids_BT = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device) % vocab
    with torch.inference_mode():
        states_BTD: Tensor = model.base_model(input_ids=token_ids_BT, use_cache=False)[0].float()
    first_TD, second_TD = states_BTD[:, :2]
    # Equal but for rounding; a model that looks ahead differs by far more, even a freshly initialised one.
    tolerance = 32 * torch.finfo(next(model.parameters()).dtype).eps * first_TD.abs().max()
    if not (first_TD - second_TD).abs().max() <= tolerance:
        raise SubstrateError(
            f"{name!r} ({model.config.model_type}) is not decoder-only: its states depend on later tokens"
        )


def _plain(value: Any) -> Any:
    """JSON form of a config value; floats to 6 digits, because GGUF keeps 1e-5 as the float32 beside it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
