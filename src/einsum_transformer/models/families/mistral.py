"""mistral: Mistral 7B, Nemo and all others with model_type "mistral": llama with a sliding window and no
biases."""

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared


def _read(keys: Keys) -> ModelConfig:
    # 4096 is the default of transformers if the key is absent; null means no window.
    return read_shared(keys, "mistral", sliding_window=keys.nullable("sliding_window", int, 4096))


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=_read,
    write_config=lambda config: write_shared(config, "sliding_window"),
    write_gguf=lambda config: gguf.write_shared(config) | gguf.write_window(config),
    gguf_names=gguf.NAMES,
    gguf_architecture="llama",
    llama_cpp_windows=False,
    gguf_permuted=gguf.PERMUTED,
)
