"""The registry of architectures: a file here is a value of `DecoderConfig.architecture`.

A file offers:

    REFERENCE   the class in transformers that reads its checkpoints, or None (then it is saved in Nestling's own form)
    Config      a subclass of `DecoderConfig` with the family's defaults
    build       build(config) -> Decoder, with its own block class where the family needs one
    tiny        tiny() -> Config for the contract tests

and, where REFERENCE is a class, the road to and from the Hugging Face folder:

    MODEL_TYPE      `model_type` in config.json
    to_hub          to_hub(config) -> dict, the family's config.json
    from_hub        from_hub(dict) -> Config
    export_weights  export_weights(state, config) -> state under the family's names
    import_weights  import_weights(state, config) -> state under ours

and, where llama.cpp computes the family, GGUF, the name of its graph there (see interop/gguf.py).
"""
