"""What the plugin is measured with: a load test, quality measures, benchmarks, and the bundled model that they run on.

Each is a folder of its own. They run as modules from the repository's root and are not installed with the plugin:

    python -m loadtest.load SCENARIO                   load on a server, and its report
    python -m loadtest.quality.generation              long generations of the bundled model beside dense ones
    python -m loadtest.benchmarks.kernels.prefill      one layer; also `chunks`, `decode`, `costs`
    python -m loadtest.benchmarks.engine.latency       a whole engine; also `burst` and `guard`
    python -m loadtest.robustness.differential         mixed traffic beside each request alone; also `soak` and `fuzz`
    python -m loadtest.model.train                     the bundled model; also `ruler` and `widen`

`text` holds the words, documents and the tokenizer that they share, `offline` an engine in the measuring process.
"""
