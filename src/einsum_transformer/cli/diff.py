"""`diff`: compare two models from their configs alone."""

from __future__ import annotations

from einsum_transformer.cli import options, output


def diff(
    *,
    a: options.Source,
    b: options.Source,
    batch: options.Rows = None,
    tokens: options.Length = 128,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
    json: options.Json = False,
    renamed: options.MovedSizes,
) -> None:
    """Compare two models: settings, parameters, equations, FLOPs, bytes, KV cache.

    Only configs are read, so models of any size can be compared. The table goes to stdout. In Python:
    et.diff.

    \b
    etx diff llama gemma
    etx diff mistral mixtral --seq-len 4096
    """
    from einsum_transformer.api.compare import diff as call

    with output.announced("counting the tiles of attention ...", json):
        found = call(a, b, batch or 1, tokens, offline=offline, allow_links=allow_links)
    output.write_line(found.to_dict() if json else str(found))
