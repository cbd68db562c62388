"""Any decoder-only model is a substrate: blocks are found, identity is in the weights, what is not one is refused."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from ftw.errors import ConfigError, SubstrateError
from ftw.substrate.model import Substrate, SubstrateConfig, convert_gguf, load_folder
from tests.conftest import byte_tokenizer, tiny_llama

SIZES = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GATED, sliding_window=8),
    "qwen3": lambda: transformers.Qwen3Config(**GATED),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=261, n_embd=32, n_layer=3, n_head=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=64),
}


def tiny_model(architecture: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]())


def saved_llama(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", CONFIGS)
def test_blocks_are_found_without_knowing_the_architecture(architecture: str) -> None:
    substrate = Substrate.from_model(tiny_model(architecture), byte_tokenizer(), name=architecture)
    assert substrate.num_layers == 3
    assert substrate.width == 32
    (kind,) = {type(block).__name__ for block in substrate.blocks}
    assert "Layer" in kind or "Block" in kind


def test_layers_are_indices_or_fractions_of_the_depth(tiny_substrate: Substrate) -> None:
    assert tiny_substrate.layers([0.3, 0.5, 0.99]) == (1, 2, 3)
    assert tiny_substrate.layers([3, 0, 3]) == (3, 0)
    for wrong in (4, -1, 1.5):
        with pytest.raises(SubstrateError, match="0-3"):
            tiny_substrate.layers([wrong])
    with pytest.raises(SubstrateError, match="no layers"):
        tiny_substrate.layers([])


def test_fingerprint_is_the_same_in_bfloat16_and_without_the_head(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "model")
    prints = {
        SubstrateConfig(name="own", path=str(folder), dtype=dtype, device="cpu").build().fingerprint
        for dtype in ("float32", "bfloat16", "float16", "auto")
    }
    headless = Substrate.from_model(tiny_llama().model.bfloat16(), byte_tokenizer(), name="headless")
    assert prints == {headless.fingerprint}


def test_fingerprint_tells_weights_and_structure_apart() -> None:
    def fingerprint(**change: float) -> str:
        model = tiny_llama()
        for key, value in change.items():
            setattr(model.config, key, value)
        return Substrate.from_model(model, byte_tokenizer(), name=str(change)).fingerprint

    other = Substrate.from_model(tiny_llama(seed=1), byte_tokenizer(), name="same name").fingerprint
    assert len({fingerprint(), fingerprint(rms_norm_eps=1e-3), other}) == 3
    # GGUF keeps 1e-6 as the float32 next to it: that is the same model.
    assert fingerprint(rms_norm_eps=float(np.float32(1e-6))) == fingerprint()


def test_casting_leaves_the_rotary_frequencies_alone(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "model")
    substrate = SubstrateConfig(name="own", path=str(folder), dtype="bfloat16", device="cpu").build()
    assert substrate.dtype == "bfloat16"
    assert {buffer.dtype for buffer in substrate.model.buffers()} == {torch.float32}


def test_position_zero_is_never_content(tiny_substrate: Substrate) -> None:
    tokens = tiny_substrate.encode("cat")
    assert tokens[0] == tiny_substrate.sink_token_id == tiny_substrate.tokenizer.bos_token_id
    assert tiny_substrate.tokenizer.decode(tokens[1:]) == "cat"
    assert tiny_substrate.encode("cat", max_tokens=2) == tokens[:2]
    chat = tiny_substrate.chat("hi", system="be brief")
    assert tiny_substrate.tokenizer.decode(chat) == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert chat[0] in tiny_substrate.tokenizer.all_special_ids


def test_a_tokenizer_without_bos_or_template_gets_eos_first_and_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.chat_template = None
    substrate = Substrate.from_model(tiny_llama(), tokenizer, name="base")
    assert substrate.encode("a")[0] == tokenizer.eos_token_id
    assert substrate.chat("a") == substrate.encode("a")


def test_describe_names_every_block(tiny_substrate: Substrate) -> None:
    assert [f"model.layers.{layer}" in tiny_substrate.describe() for layer in range(5)] == [True] * 4 + [False]


def test_models_that_look_ahead_are_refused() -> None:
    torch.manual_seed(0)
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, intermediate_size=64))
    with pytest.raises(SubstrateError, match="later tokens"):
        Substrate.from_model(bert, byte_tokenizer(), name="bert")
    t5 = transformers.T5Config(vocab_size=261, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64)
    with pytest.raises(SubstrateError, match="encoder-decoder"):
        Substrate.from_model(transformers.T5ForConditionalGeneration(t5), byte_tokenizer(), name="t5")


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(SubstrateError, match=r"no nn\.ModuleList of 7 blocks"):
        Substrate.from_model(model, byte_tokenizer(), name="odd")


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(SubstrateError, match=r"layers\.1\.mlp\.up_proj"):
        Substrate.from_model(model, byte_tokenizer(), name="nan")


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(SubstrateError, match=r"no config\.json"):
        SubstrateConfig(name="own", path=str(empty)).build()

    folder = saved_llama(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    with pytest.raises(SubstrateError, match="model"):
        load_folder(folder)
    weights.unlink()
    with pytest.raises(SubstrateError, match="safetensors"):
        load_folder(folder)
    weights.write_bytes(whole)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(SubstrateError, match="lacks"):  # never random numbers in place of the fifth block
        load_folder(folder)
    hostile = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(hostile))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SubstrateError, match="cannot load"):
        load_folder(folder)


def test_wrong_dtype_and_device_name_the_choices() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        SubstrateConfig(dtype="bf16").build()
    with pytest.raises(ConfigError, match="cpu"):
        SubstrateConfig(device="gpu").build()


def write_gguf(model: transformers.LlamaForCausalLM, file: Path) -> None:
    """The model in llama.cpp's form: its names, its order of rotary rows, and 8-bit blocks for one matrix."""
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # A reader needs one merge, so the last piece gives way to it.
    writer.add_token_list([*(piece for piece, _ in pieces[:-1]), "zz"])
    writer.add_token_types([3 if index in tokenizer.all_special_ids else 1 for _, index in pieces])
    writer.add_token_merges(["z z"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if "up_proj" in name else None
        stored = gguf.quants.quantize(array, kind) if kind else np.ascontiguousarray(array)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_dequantised_weights_bit_for_bit_and_the_tokenizer(tmp_path: Path, own_home: Path) -> None:
    model = tiny_llama()
    write_gguf(model, file := tmp_path / "tiny.gguf")
    for name, weight in model.named_parameters():
        if "up_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
            weight.data = torch.from_numpy(stored.copy())

    substrate = SubstrateConfig(name="tiny", path=str(file), device="cpu").build()

    loaded = dict(substrate.model.named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in model.named_parameters())
    tokens = torch.tensor([substrate.encode("cat")])
    with torch.inference_mode():
        torch.testing.assert_close(substrate.model(tokens).logits, model(tokens).logits)
    assert substrate.tokenizer.decode(tokens[0, 1:]) == "cat"
    (converted,) = (own_home / "models").glob("tiny*")
    assert (converted / "model.safetensors").is_file()
    again = SubstrateConfig(name="tiny", path=str(file), device="cpu").build()
    assert again.fingerprint == substrate.fingerprint


def test_a_truncated_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    write_gguf(tiny_llama(), file := tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(SubstrateError, match="GGUF"):
        convert_gguf(file, tmp_path / "out" / "tiny")
    assert not (tmp_path / "out" / "tiny").exists()
