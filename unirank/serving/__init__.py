"""serving: other engines load the result.

In: a compressed checkpoint, as an engine reads it: tensor by tensor, each process its share.
Out: layers of the engine that multiply by the factors: of vLLM (vllm, vllm_linear), from pieces that are put together
without any engine (members).

Here one may import an engine, and only below the function that the engine calls: `import unirank` costs nothing of it.
Nothing here knows how ranks were found.

Changed most often: `vllm_linear`, when vLLM changes what it asks of a linear's method.
"""
