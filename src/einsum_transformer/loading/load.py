"""`load` a model from a folder, a file or the hub."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading.contents import Contents, look
from einsum_transformer.loading.hub import DEFAULT_MODEL
from einsum_transformer.loading.libraries import use_default
from einsum_transformer.loading.sources import Options, Source, find, name_of
from einsum_transformer.loading.weights import ENCODINGS, memory, random_weights, read_weights
from einsum_transformer.models.adapter_text import with_adapter_tokenizer
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft import with_adapter
from einsum_transformer.models.quantization import Bfloat16, Quantizer
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.scheme import Quantization, cache_types
from einsum_transformer.models.unsupported import adapter_in
from einsum_transformer.notes import note
from einsum_transformer.tables import quantity


@checked
def load(
    source: str | Path | RunConfig = DEFAULT_MODEL,
    dtype: str = "float32",
    quantization: str | None = None,
    quantization_mode: str = "real",
    quantization_exclude: Sequence[str] = (),
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
    adapter: str | Path | None = None,
    max_layers: int | None = None,
    seed: int | None = None,
    weight_budget: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    allow_links: bool = False,
    packed: bool | None = None,
    quantization_by_name: Mapping[str, str] | None = None,
) -> Model:
    """Load a model from a Hugging Face folder, a hub id, a .gguf file or a config JSON (random weights).

    The default source is SmolLM2-135M-Instruct. The type of a file is determined from its contents. A split
    GGUF model can be given by any of its parts, a single GGUF model by its folder, and one of several GGUF
    models in a hub repository as `owner/name:Q4_K_M`.

    dtype: "float32" or "float64", the type of weights and computation; "bfloat16": of the matrices, which
    then take two bytes per element; the computation is in float32. max_layers: load only the first layers.
    seed: seed of random weights. weight_budget: maximum bytes of weights in memory; the rest is read from the
    file whenever an equation needs it. adapter: a PEFT or mlx-lm folder, whose adapters are applied to the
    weights (unmerged; see `merge`); its tokenizer and chat template take precedence over those of the base
    model.
    revision: revision of the hub repository. offline: use cached files only. allow_links: follow links that
    lead out of the model's folder, as in shared stores.

    quantization: a scheme such as "W8A16", see `quantize`; "none": no quantization, also if the run config
    has a scheme. Weights are read and quantized one by one. quantization_mode, quantization_exclude,
    quantization_by_name: `mode`, `exclude` and `by_name` of `quantize`.
    cache_type_k, cache_type_v: how cached keys and values are stored: "float32" (the type of the
    computation, the default), "float16", "int8" or "int4" (with a scale per token and 64 elements of a head).
    packed: keep the matrices of a quantized checkpoint in the encoding of its files (GGUF types, FP8, GPTQ,
    AWQ, compressed-tensors, MLX) and dequantize them inside products; None: only if their floats would need
    more than half of the memory.
    Raises InputError, in one line; a tensor that is missing, unexpected or of the wrong shape is an error.
    """
    use_default()
    options = Options(dtype, max_layers, seed, weight_budget, revision, offline, allow_links, packed=packed)
    found = find(source, options)
    details = quantization_mode, quantization_exclude, quantization_by_name
    chosen = Quantization.of(quantization, *details)
    if quantization is None and isinstance(found, RunConfig):
        with suppress(InputError):  # `look` raises it, with the name of the config
            chosen = Quantization.of(found.quantization, *details)
    if chosen is None and quantization_exclude:
        raise InputError("`quantization_exclude` needs `quantization`")
    if chosen is None and quantization_by_name:
        raise InputError("`quantization_by_name` needs `quantization`")
    if chosen is None and quantization_mode == "simulated" and cache_type_k is cache_type_v is None:
        raise InputError("`quantization_mode` needs `quantization`")
    if chosen is not None and dtype == "bfloat16":
        raise InputError("`dtype` bfloat16 excludes `quantization`, which stores the matrices as integers")
    options = replace(options, quantization=chosen)
    model = _model(found, options)
    if quantization == "none" and model.quantization is not None:
        raise InputError(
            f"{model.source}: the weights are stored as {model.quantization.scheme}: load the original model"
        )
    simulated = quantization_mode == "simulated"
    types = cache_types(cache_type_k, cache_type_v, model.quantization, simulated)
    model = replace(model, cache_types=types)
    if isinstance(found, RunConfig):
        model = replace(model, run_config=found)
    return model if adapter is None else with_adapter_tokenizer(with_adapter(model, adapter), adapter)


def _model(source: Source, options: Options) -> Model:
    found = look(source, options)
    assert found.config is not None
    config = options.truncated(found.config)
    quantizer: Quantizer | Bfloat16 | None = None
    if options.quantization is not None:
        if options.weight_budget is not None:
            raise InputError("`weight_budget` excludes `quantization`: quantized weights are in memory")
        quantizer = Quantizer(options.quantization, FAMILIES[config.model_type], weights_of(config))
    elif options.dtype == "bfloat16" and found.quantization is None:
        if options.weight_budget is not None:
            raise InputError("`weight_budget` excludes `dtype` bfloat16: such weights are in memory")
        quantizer = Bfloat16(weights_of(config))
    if found.quantization is not None and (options.weight_budget is not None or options.dtype == "bfloat16"):
        name = "dtype" if options.weight_budget is None else "weight_budget"
        raise InputError(f"{name_of(source)}: quantized weights are in memory as integers: omit `{name}`")
    if found.quantization is not None and quantizer is not None:
        raise InputError(
            f"{name_of(source)}: the model is already quantized to {found.quantization}: omit `quantization`"
        )
    if found.tensors is None or found.places is None:
        if options.packed:
            raise InputError(
                f"`packed` needs a quantized checkpoint, but the weights of {name_of(source)} are random"
            )
        if options.weight_budget is not None:
            raise InputError(
                f"`weight_budget` needs weights in files, but those of {name_of(source)} are random"
            )
        seed = options.seed or 0
        decoder = random_weights(config, options.computed_in, seed, name_of(source), quantizer)
        name = f"{name_of(source)} (random weights, seed {seed})"
        return _with_quantization(Model(config, decoder, source=name), quantizer)
    path = found.tensors.path
    options = replace(options, packed=_is_packed(found, config, options, quantizer))
    if adapter := adapter_in(path):
        note(f"{path / 'adapter_config.json'}: not used: {adapter}")
    decoder = read_weights(found.tensors, config, found.places, options, quantizer)
    model = Model(config, decoder, found.tokenizer, found.generation_config, str(path))
    return replace(
        _with_quantization(model, quantizer), quantization=found.quantization or options.quantization
    )


def _is_packed(
    found: Contents, config: ModelConfig, options: Options, quantizer: Quantizer | Bfloat16 | None
) -> bool:
    """Whether matrices stay in the encoding of their file: as asked for, or if their floats would need more
    than half of the memory. Raises InputError for settings that exclude it."""
    assert found.tensors is not None
    source = found.tensors.path
    excluded = None
    if options.quantization is not None:
        excluded = "`quantization`"
    elif quantizer is not None:
        excluded = "`dtype` bfloat16"
    elif options.weight_budget is not None:
        excluded = "`weight_budget`"
    encodings = sorted({info.dtype for info in found.infos.values()} & ENCODINGS)
    if options.packed and not encodings and found.quantization is None:
        raise InputError(f"{source}: `packed` needs quantized tensors, and there are none")
    if options.packed and excluded:
        raise InputError(f"`packed` excludes {excluded}: both decide how matrices are stored")
    if options.packed is not None or excluded or not encodings:
        return bool(options.packed)
    needed = sum(math.prod(weight.stored) for weight in weights_of(config)) * options.computed_in.itemsize
    if needed <= memory() / 2:
        return False
    note(
        f"{source}: the matrices stay in their encoding ({', '.join(encodings)}), since as "
        f"{options.dtype} they would need {quantity(needed, 'B')} (`packed`)"
    )
    return True


def _with_quantization(model: Model, quantizer: Quantizer | Bfloat16 | None) -> Model:
    """The model with the settings of its quantization, which a note describes."""
    if quantizer is None:
        return model
    quantizer.finish(model.source, model.decoder)
    return model if isinstance(quantizer, Bfloat16) else replace(model, quantization=quantizer.quantization)
