"""A sentence encoder: a text becomes one direction, near to those of texts that mean the like.

The default is all-MiniLM-L6-v2; any encoder that transformers knows can take its place. Read as sentence-transformers
read it: mean over the tokens of the last states, scaled to length one.

Axes: B texts, T tokens, D width.

Source: Reimers and Gurevych 2019, Sentence-BERT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftw.errors import SubstrateError
from ftw.substrate.model import fingerprint_model, quiet_transformers
from ftw.substrate.sources import fetch

DEFAULT = "all-minilm-l6-v2"
MAX_TOKENS = 256  # of a text; what follows is not read, as the model was trained
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False, kw_only=True)
class SentenceEncoder:
    """An encoder with its tokenizer.

    Attributes:
        name: in the lock file, on the Hub, or a local folder. width: D. fingerprint: of structure and weights.
    """

    name: str
    model: Any
    tokenizer: Any
    width: int
    fingerprint: str

    @classmethod
    def load(cls, name: str = DEFAULT) -> "SentenceEncoder":
        """Fetch (once) and load: a name in the lock file, a local folder, or a repository on the Hub.

        Raises:
            SourceError: no address gave it. SubstrateError: its files are no encoder that can be loaded safely.
        """
        model, tokenizer = _load(fetch(name).folder)
        model = model.float().eval().requires_grad_(False)
        return cls(
            name=name,
            model=model,
            tokenizer=tokenizer,
            width=int(model.config.hidden_size),
            fingerprint=fingerprint_model(model),
        )

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts, [B, D] float32 of length one; zeros for a text without a letter."""
        ids = [self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"] for text in texts]
        encoded_BD = torch.zeros(len(ids), self.width)
        # Of like lengths together: padding costs as much as text.
        waiting = sorted((place for place, text in enumerate(texts) if text.strip()), key=lambda place: len(ids[place]))
        while waiting:
            num = max(1, TOKENS_AT_ONCE // len(ids[waiting[-1]]))
            part, waiting = waiting[-num:], waiting[:-num]
            encoded_BD[torch.tensor(part)] = self._encode([ids[place] for place in part])
        return encoded_BD

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that are read."""
        return min(MAX_TOKENS, int(getattr(self.model.config, "max_position_embeddings", MAX_TOKENS)))

    def _encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, ids))
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
        states_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT.unsqueeze(-1) / mask_BT.sum(dim=1).view(-1, 1, 1)
        return torch.nn.functional.normalize((states_BTD * weights_BT1).sum(dim=1), dim=-1)


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a transformers folder; only safetensors, never the folder's code."""
    from transformers import AutoModel, AutoTokenizer

    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
            loaded: Any = AutoModel.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True, **safe
            )
            model, info = loaded
    except Exception as error:  # a damaged file makes transformers, tokenizers and safetensors raise nearly anything
        raise SubstrateError(
            f"cannot load the encoder {folder}: {error}\n(FTW reads encoders that transformers knows, as safetensors)"
        ) from error
    if hasattr(model.config, "is_decoder") and model.config.is_encoder_decoder:
        raise SubstrateError(f"{folder} is a {model.config.model_type}, which is no plain encoder")
    missing = [name for name in map(str, info["missing_keys"]) if not name.startswith("pooler.")]
    if missing or info["mismatched_keys"]:
        raise SubstrateError(f"{folder} lacks weights: {(missing or sorted(map(str, info['mismatched_keys'])))[:3]}")
    # A head over the first token, which is not read; where the file has none its weights would be random.
    model.pooler = None
    return model, tokenizer
