"""The configs of the models that the shipped recipes name, as on the hub: for plans and benchmarks that need no weights."""

from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

REAL_CONFIGS: dict[str, PreTrainedConfig] = {
    "openai-community/gpt2": GPT2Config(),
    "EleutherAI/pythia-410m": GPTNeoXConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50304
    ),
    "EleutherAI/pythia-1.4b": GPTNeoXConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16, vocab_size=50304
    ),
    "meta-llama/Llama-3.2-3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}
# A small Llama of the same structure that a CPU runs quickly, to try a script.
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
)


def config_named(name: str) -> PreTrainedConfig:
    """The config of a model in `REAL_CONFIGS`, by its name with or without the owner, or ``tiny``."""
    named = {full.partition("/")[2]: config for full, config in REAL_CONFIGS.items()} | REAL_CONFIGS | {"tiny": TINY}
    return named[name]
