const samplesOf = (run, stage, step, layer, visit) => {
  const call = run.arrays.calls.find((c) => c.stage === stage.name && c.layer === layer && c.role === step.role
    && c.equation === step.equation && c.path.join("/") === step.path.join("/"));
  return call ? call.samples[Math.min(visit, call.samples.length - 1)] : null;
};
const layersWithArrays = (run, stage, step) => {
  const found = run.arrays.calls.filter((c) => c.stage === stage.name && c.role === step.role && c.equation === step.equation
    && c.path.join("/") === step.path.join("/"));
  return found.map((c) => c.layer).filter((l) => l === null || step.layers.includes(l)).sort((a, b) => a - b);
};

const joined = (letters) => [...letters].join(" × ") || "1";
const partText = (s) => {
  const one = (letters, count, step) => {
    const shown = Math.ceil(count / step);
    return step === 1 ? `all ${count} of ${joined(letters)}` : `${shown} of ${count} of ${joined(letters)}, in steps of ${step}`;
  };
  const fixed = Object.entries(s.fixed).filter(([letter]) => letter !== "b" || s.shape[0] > 1).map(([letter, i]) => `${letter} = ${i}`);
  const rows = s.rows ? `rows: ${one(s.rows, s.row_count, s.row_step)}; ` : "";
  return `${rows}columns: ${one(s.columns, s.column_count, s.column_step)}${fixed.length ? `; ${fixed.join(", ")}` : ""}`;
};

const heatMap = (s, name) => {
  const rows = s.values.length, columns = s.values[0].length;
  const size = Math.max(4, Math.min(14, Math.floor(320 / Math.max(columns, 8))));
  const tall = rows === 1 ? 24 : size;
  const most = Math.max(Math.abs(s.lowest ?? 0), Math.abs(s.highest ?? 0)) || 1;
  const rects = [];
  s.values.forEach((row, y) => row.forEach((v, x) => {
    rects.push(svg("rect", { x: x * size, y: y * tall, width: size, height: tall, class: `cell ${v === null ? "x" : v < 0 ? "n" : "p"}`,
      "fill-opacity": v === null ? 1 : (Math.abs(v) / most).toFixed(3) }));
  }));
  const title = `Heat map of ${name}`;
  const description = `${rows} rows, ${columns} columns, from ${number(s.lowest)} to ${number(s.highest)}. The numbers are in the table below.`;
  const image = picture(columns * size, rows * tall, title, description, rects,
    svg("rect", { x: 0, y: 0, width: columns * size, height: rows * tall, class: "frame" }));
  const readout = el("p", { class: "readout", text: `from ${number(s.lowest)} to ${number(s.highest)}; blue is negative, orange positive` });
  image.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const x = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
    const y = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
    readout.textContent = `row ${y * s.row_step}, column ${x * s.column_step}: ${number(s.values[y][x])}`;
  });
  const headings = ["row", ...s.values[0].map((_, x) => x * s.column_step)];
  return el("figure", null,
    el("figcaption", null, el("strong", { text: `${name} ` }), equation(s.term), ` (${s.shape.join(" × ")}, ${s.dtype}). ${partText(s)}.`),
    image, readout,
    lazy("numbers", () => table(`Numbers of ${name}`, headings, s.values.map((row, y) => [y * s.row_step, ...row.map(number)]), 0, "numbers")));
};

const measuredRow = (run, stage, step) => {
  const part = ["prefill", "decode"].includes(stage.name) ? run.measured : run.training;
  const role = step.equation ? step.role : step.path[step.path.length - 1];
  return part ? part.equations.find((r) => r.stage === stage.name && r.role === role && r.equation === step.equation) : null;
};

const costTable = (step) => {
  const rows = step.equation
    ? [["FLOPs", quantity(step.flops)], ["bytes", quantity(step.bytes, "B")], ["of weights", quantity(step.weight_bytes, "B")],
       ["of keys and values", quantity(step.kv_bytes, "B")], ["of other arrays", quantity(step.activation_bytes, "B")],
       ["FLOPs per byte", (step.flops / Math.max(1, step.bytes)).toPrecision(3)], ["calls", step.calls], ["type", step.dtype]]
    : step.functions.map((f) => [`${f.function} (×${f.calls})`, `${quantity(f.elements)} elements`]);
  return table(step.equation ? "Cost in one layer" : "NumPy functions in one layer", [step.equation ? "quantity" : "function", "amount"], rows);
};

const timeTable = (row, stage) => {
  const rows = [["calls", row.calls], ["median", seconds(row.p50)], ["90 % below", seconds(row.p90)], ["99 % below", seconds(row.p99)],
    ["all calls", seconds(row.seconds)], [`share of ${stage.name}`, percent(row.share)]];
  if (row.equation) rows.push(["rate", quantity(1e9 * row.gflops, "FLOP/s")], ["traffic", quantity(1e9 * row.gbps, "B/s")]);
  if (row.predicted !== null) rows.push(["predicted, all calls", seconds(row.predicted)]);
  if (row.roofline !== null) rows.push(["of the roofline", percent(row.roofline)]);
  if (row.bound) rows.push(["bound by", row.bound]);
  return table(`Measured in ${stage.name}, all layers`, ["quantity", "measured"], rows);
};

const detail = (run, stage, step, layer, visit) => {
  const node = el("div");
  const title = step.equation ? el("h4", null, `${step.role}: `, equation(step.equation)) : el("h4", { text: step.role });
  const where = [stage.name, ...step.path].join(" / ") + (step.layers.length ? `, ${step.layers.length > 1 ? "layers" : "layer"} ${ranges(step.layers)}` : "");
  node.append(title, el("p", { class: "note", text: where }));
  const columns = el("div", { class: "columns" });
  if (step.equation) {
    columns.append(table("Letters and sizes", ["letter", "meaning", "size"], Object.entries(step.sizes).map(([letter, size]) =>
      [el("b", { class: "letter", "data-letter": letter, text: letter }), data.letters[letter] || "", size]), 2));
  }
  columns.append(costTable(step));
  const row = measuredRow(run, stage, step);
  if (row) columns.append(timeTable(row, stage));
  node.append(columns);
  if (row && row.lowering) node.append(el("p", null, "Runs as ", el("code", { text: row.lowering }), `. BLAS library: ${data.machine.blas}.`));
  if (step.gradients && step.gradients.length) {
    node.append(el("p", null, "Gradient equations, of the first and the second operand: ",
      step.gradients.map((text, i) => [i ? "; " : "", equation(text)]).flat(), "."));
  }
  if (step.equation) node.append(arraysOf(run, stage, step, layer, visit));
  return node;
};

const arraysOf = (run, stage, step, layer, visit) => {
  const layers = layersWithArrays(run, stage, step);
  if (!layers.length) return el("p", { class: "note", text: "The arrays of this step are not in memory as arrays, or the step did not run." });
  const holder = el("div", { class: "maps" });
  const terms = step.equation.split("->");
  const names = [...terms[0].split(",").map((_, i) => `operand ${i + 1}`), "result"];
  const show = (chosen) => {
    const indices = samplesOf(run, stage, step, chosen, visit) || [];
    holder.replaceChildren(...indices.map((i, n) => (i === null
      ? el("p", { class: "note", text: `${names[n]}: quantized or read from a file, not in memory as an array` })
      : heatMap(run.arrays.samples[i], names[n]))));
  };
  const first = layers.includes(layer) ? layer : layers[0];
  show(first);
  const chooser = layers[0] === null ? null : el("div", { class: "controls" },
    select("arrays of layer", layers.map((l) => [l, l]), first, (value) => show(Number(value))));
  return el("div", null, el("h4", { text: "Arrays" }), chooser, holder);
};

/* 0–29, or 0, 2, 4. */
const ranges = (numbers) => {
  const parts = [];
  for (const n of numbers) {
    const last = parts[parts.length - 1];
    if (last && last[1] === n - 1) last[1] = n; else parts.push([n, n]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
};
