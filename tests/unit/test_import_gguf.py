"""A small GGUF file written here, imported, and compared with the numbers that were put into it."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.errors import UserError
from tools import import_gguf

HIDDEN, INNER, LAYERS, HEADS, VOCAB = 32, 64, 2, 4, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(file, the token embedding in it)."""
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCAB)
    letters = [chr(ord("a") + i) for i in range(26)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        ["<|end|>", "<|start|>", "<|unk|>", *letters, "ab", "cd", *[f"<{i}>" for i in range(9)]]
    )
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)  # not Llama's default
    writer.add_unk_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def tensor(*shape):
        return draw.standard_normal(shape, dtype=np.float32)

    embedding = tensor(VOCAB, HIDDEN)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", tensor(HIDDEN))
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor(HIDDEN, HIDDEN))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor(INNER, HIDDEN))
        writer.add_tensor(f"blk.{i}.ffn_down.weight", tensor(HIDDEN, INNER))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor(HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, embedding


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_import(source, tmp_path, dtype, expected):
    file, embedding = source
    out = tmp_path / "model"
    assert import_gguf.import_model(str(file), out, dtype)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(embedding).to(expected))
    # The file has no output matrix: tied, and stored once.
    assert model.lm_head.weight is model.model.embed_tokens.weight
    num_weights = sum(p.numel() for p in model.parameters())
    size = (out / "model.safetensors").stat().st_size
    assert num_weights * expected.itemsize < size < num_weights * expected.itemsize + 20_000
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["num_hidden_layers"]) == (["LlamaForCausalLM"], LAYERS)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"content": "abc"}], tokenize=False) == "abc"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert tokenizer.bos_token_id == model.generation_config.bos_token_id == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_same_source_is_reused_and_another_refused(source, tmp_path):
    file, _ = source
    out = tmp_path / "model"
    import_gguf.import_model(str(file), out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert not import_gguf.import_model(str(file), out)
    with pytest.raises(UserError, match=r"exists and is not an import of small.gguf as fp32"):
        import_gguf.import_model(str(file), out, "fp32")
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_unreadable_sources(tmp_path, monkeypatch):
    text = tmp_path / "notes.gguf"
    text.write_text("not a model")
    with pytest.raises(UserError, match="not a GGUF file"):
        import_gguf.find_gguf(str(text))
    with pytest.raises(UserError, match="no such file"):
        import_gguf.find_gguf(str(tmp_path / "gone.gguf"))
    with pytest.raises(UserError, match="neither a file nor an installed package"):
        import_gguf.find_gguf("surely-not-installed")
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match=r"holds 0 .gguf files"):
        import_gguf.find_gguf("carrier")
    (package / "one.gguf").write_bytes(b"GGUF")
    assert import_gguf.find_gguf("carrier") == package / "one.gguf"


def test_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "perceptron")
    writer.add_tensor("w", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"cannot load this GGUF file.*perceptron"):
        import_gguf.import_model(str(tmp_path / "odd.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(import_gguf.NEEDED, "surely_not_installed", "surely-not-installed")
    with pytest.raises(UserError, match="pip install surely-not-installed"):
        import_gguf.import_model(str(source[0]), tmp_path / "out")
