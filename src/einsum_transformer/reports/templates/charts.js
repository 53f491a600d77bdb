const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8", "--c9"];
const colour = (i) => `var(${COLOURS[i % COLOURS.length]})`;

/* Numbers for an axis: 1, 2 or 5 times a power of ten. */
const ticks = (low, high, count) => {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step / 1e6; x += step) found.push(x);
  return found;
};

/* A point marker that differs in form as well as in colour. */
const marker = (i, x, y, r = 5) => {
  const forms = [
    () => svg("circle", { cx: x, cy: y, r }),
    () => svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r }),
    () => svg("path", { d: `M${x} ${y - r * 1.3}L${x + r * 1.2} ${y + r}H${x - r * 1.2}Z` }),
    () => svg("path", { d: `M${x} ${y - r * 1.4}L${x + r * 1.3} ${y}L${x} ${y + r * 1.4}L${x - r * 1.3} ${y}Z` }),
  ];
  const node = forms[i % forms.length]();
  node.style.fill = colour(i);
  node.setAttribute("fill-opacity", "0.75");
  return node;
};
const keysOf = (entries) => el("ul", { class: "keys" }, entries.map(([mark, text]) =>
  el("li", null, svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, mark), text)));
const swatch = (i) => {
  const node = svg("rect", { x: 1, y: 1, width: 12, height: 12, "fill-opacity": i < COLOURS.length ? 1 : 0.5 });
  node.style.fill = colour(i);
  return node;
};

/* The stages of a run, and the phases inside of one of them. */
draw.timeline = (run, node) => {
  const parts = [["prompt and continuation", run.measured.timeline]];
  if (run.training) parts.push(["last training step", run.training.timeline]);
  for (const [name, spans] of parts) {
    const stages = spans.filter((s) => !s.path.includes("/"));
    const detailed = stages.filter((s) => spans.some((t) => inside(t, s)));
    const whole = el("div"), part = el("div");
    node.append(el("h3", { text: `Time line: ${name}` }), whole);
    responsive(whole, (width) => stageChart(stages, width, name));
    const decodes = stages.filter((s) => s.path === "decode");
    const nameOf = (s) => (s.path === "decode" ? `decode step ${decodes.indexOf(s) + 1} of ${decodes.length}` : s.path);
    const show = (i) => { part.replaceChildren(); const box = el("div"); part.append(box); responsive(box, (width) => phaseChart(detailed[i], spans, width, nameOf(detailed[i]))); };
    if (detailed.length) {
      node.append(el("div", { class: "controls" }, select("phases inside of", detailed.map((s, i) => [i, `${nameOf(s)}, ${seconds(s.seconds)}`]), 0, (v) => show(Number(v)))), part);
      show(0);
    }
  }
};
const inside = (t, s) => t !== s && t.path.startsWith(`${s.path}/`) && t.start >= s.start && t.start < s.start + s.seconds;

const stageChart = (stages, width, name) => {
  const end = Math.max(...stages.map((s) => s.start + s.seconds)), names = [...new Set(stages.map((s) => s.path))];
  const left = 84, scale = (width - left - 10) / end, height = names.length * 24 + 26;
  const bars = stages.map((s) => {
    const i = names.indexOf(s.path);
    const bar = svg("rect", { x: left + s.start * scale, y: i * 24 + 4, width: Math.max(1, s.seconds * scale - 0.6), height: 16 }, svg("title", { text: `${s.path}: ${seconds(s.seconds)} from ${seconds(s.start)}` }));
    bar.style.fill = colour(i);
    return bar;
  });
  const sums = names.map((n) => [n, stages.filter((s) => s.path === n)]).map(([n, own]) => [n, own.length, seconds(own.reduce((sum, s) => sum + s.seconds, 0)), seconds(own[0].start)]);
  const axis = ticks(0, end, width / 110).map((t) => [svg("line", { x1: left + t * scale, x2: left + t * scale, y1: 0, y2: height - 22, class: "axis" }),
    label(left + t * scale, height - 6, t === 0 ? "0" : seconds(t).replace(/\.?0+ /, " "), { class: "soft", "text-anchor": left + t * scale > width - 40 ? "end" : "middle" })]);
  const text = sums.map(([n, c, s]) => `${n} ${s}${c > 1 ? ` in ${c}` : ""}`).join(", ");
  return el("figure", null, picture(width, height, `Time line of ${name}`, text, axis.flat(), bars, names.map((n, i) => label(0, i * 24 + 16, n))),
    lazy("numbers", () => table(`Stages of ${name}`, ["stage", "times", "seconds", "first start"], sums)));
};

const phaseChart = (stage, spans, width, name) => {
  const own = spans.filter((t) => inside(t, stage)), scale = (width - 2) / stage.seconds;
  const names = [...new Set(own.map((t) => t.path.slice(stage.path.length + 1)))];
  const depth = (t) => t.path.split("/").length - 2, deepest = Math.max(0, ...own.map(depth));
  const bars = own.map((t) => {
    const path = t.path.slice(stage.path.length + 1);
    const bar = svg("rect", { x: 1 + (t.start - stage.start) * scale, y: depth(t) * 26 + 4, width: Math.max(0.5, t.seconds * scale - 0.4), height: 22 },
      svg("title", { text: `${path}${t.layer === null ? "" : ` ${t.layer}`}: ${seconds(t.seconds)}` }));
    bar.style.fill = path === "layer" ? "var(--soft)" : colour(names.indexOf(path));
    bar.setAttribute("fill-opacity", path === "layer" ? (t.layer % 2 ? "0.15" : "0.3") : names.indexOf(path) < COLOURS.length ? "1" : "0.5");
    return bar;
  });
  const layers = own.filter((t) => t.path.endsWith("/layer")).filter((t) => t.seconds * scale > 16)
    .map((t) => label(1 + (t.start - stage.start + t.seconds / 2) * scale, 19, String(t.layer), { "text-anchor": "middle" }));
  const rows = names.map((n) => { const found = own.filter((t) => t.path === `${stage.path}/${n}`); const sum = found.reduce((s, t) => s + t.seconds, 0); return [n, found.length, seconds(sum), percent(sum / stage.seconds)]; });
  return el("figure", null, picture(width, (deepest + 1) * 26 + 8, `Phases of ${name}`, rows.map(([n, , s]) => `${n} ${s}`).join(", "), bars, layers),
    keysOf(names.map((n, i) => [swatch(i), n]).filter(([, n]) => n !== "layer")),
    lazy("numbers", () => table(`Phases of ${name}`, ["phase", "times", "seconds", "share"], rows)));
};

draw.roofline = (run, node) => {
  const rows = [...run.measured.equations, ...(run.training ? run.training.equations : [])].filter((r) => r.equation && r.gbps > 0 && r.gflops > 0);
  const box = el("div");
  node.append(box);
  responsive(box, (width) => rooflineChart(rows, Math.min(width, 760)));
};

const rooflineChart = (rows, width) => {
  const stages = [...new Set(rows.map((r) => r.stage))], peak = data.machine.peak && data.machine.peak / 1e9, bandwidth = data.machine.bandwidth && data.machine.bandwidth / 1e9;
  const height = 400, left = 52, top = 30, bottom = 42, xs = rows.map((r) => r.gflops / r.gbps), ys = rows.map((r) => r.gflops);
  const log = Math.log10;
  const x0 = Math.floor(log(Math.min(...xs))), x1 = Math.ceil(log(Math.max(...xs, peak ? 2 * peak / bandwidth : 0)));
  const y0 = Math.floor(log(Math.min(...ys))), y1 = Math.ceil(log(Math.max(...ys, peak || 0)));
  const px = (x) => left + (log(x) - x0) / (x1 - x0 || 1) * (width - left - 14), py = (y) => height - bottom - (log(y) - y0) / (y1 - y0 || 1) * (height - bottom - top);
  const power = (e) => (Math.abs(e) <= 3 ? String(10 ** e) : `1e${e}`).replace(/(\.\d*?[1-9])0+$/, "$1");
  const axis = [];
  for (let e = x0; e <= x1; e++) axis.push(svg("line", { x1: px(10 ** e), x2: px(10 ** e), y1: top, y2: height - bottom, class: "axis" }), label(px(10 ** e), height - bottom + 16, power(e), { class: "soft", "text-anchor": e === x1 ? "end" : "middle" }));
  for (let e = y0; e <= y1; e++) axis.push(svg("line", { x1: left, x2: width - 14, y1: py(10 ** e), y2: py(10 ** e), class: "axis" }), label(left - 6, py(10 ** e) + 4, power(e), { class: "soft", "text-anchor": "end" }));
  axis.push(label(width - 14, height - 6, "operations per byte", { class: "soft", "text-anchor": "end" }), label(4, 12, "GFLOP/s", { class: "soft" }));
  const roof = peak ? [svg("path", { class: "roof", d: `M${px(10 ** x0)} ${py(Math.max(10 ** y0, 10 ** x0 * bandwidth))}L${px(peak / bandwidth)} ${py(peak)}H${px(10 ** x1)}` }),
    label(width - 18, py(peak) - 6, `${quantity(1e9 * peak, "FLOP/s")}`, { "text-anchor": "end" })] : [];
  const points = rows.map((r) => { const point = marker(stages.indexOf(r.stage), px(r.gflops / r.gbps), py(r.gflops)); point.append(svg("title", { text: `${r.stage}, ${r.role} ${r.equation}: ${r.gflops.toFixed(2)} GFLOP/s, ${(r.gflops / r.gbps).toPrecision(3)} per byte` })); return point; });
  const description = `${rows.length} equations of ${stages.join(", ")}; the fastest reaches ${Math.max(...ys).toFixed(1)} GFLOP/s.`;
  return el("figure", null, keysOf(stages.map((s, i) => [marker(i, 7, 7, 5), s])), picture(width, height, "Roofline", description, axis, roof, points),
    lazy("numbers", () => table("Points of the roofline", ["stage", "weight or phase", "equation", "FLOP/byte", "GFLOP/s", "of the roofline"],
      rows.map((r) => [r.stage, r.role, equation(r.equation), (r.gflops / r.gbps).toPrecision(3), r.gflops.toFixed(2), r.roofline === null ? "–" : percent(r.roofline)]), 3)));
};

const OWNERS = ["weights", "cache", "optimizer", "gradients", "saved", "temporary"];
draw.memory = (run, node) => {
  for (const [name, use] of [["prompt and continuation", run.memory], ...(run.training ? [["training", run.training.memory]] : [])]) {
    const box = el("div");
    node.append(el("h3", { text: `Memory: ${name}` }), box);
    responsive(box, (width) => memoryChart(use, width, name));
  }
};

const memoryChart = (use, width, name) => {
  const owners = OWNERS.filter((o) => use.samples.some((s) => s[o])), samples = use.samples;
  const totals = samples.map((s) => owners.reduce((sum, o) => sum + s[o], 0)), top = Math.max(...totals, use.predicted || 0) * 1.05;
  const height = 240, left = 66, bottom = 30, end = samples[samples.length - 1].seconds || 1;
  const px = (s) => left + s / end * (width - left - 10), py = (b) => height - bottom - b / top * (height - bottom - 8);
  let below = samples.map(() => 0);
  const areas = owners.map((o, i) => {
    const above = samples.map((s, n) => below[n] + s[o]);
    const steps = (values) => samples.map((s, n) => `${px(n ? samples[n - 1].seconds : 0)} ${py(values[n])}L${px(s.seconds)} ${py(values[n])}`);
    const back = samples.map((s, n) => `${px(s.seconds)} ${py(below[n])}L${px(n ? samples[n - 1].seconds : 0)} ${py(below[n])}`).reverse();
    const area = svg("path", { d: `M${steps(above).join("L")}L${back.join("L")}Z`, "fill-opacity": "0.75" }, svg("title", { text: o }));
    area.style.fill = colour(i);
    below = above;
    return area;
  });
  const axis = [...ticks(0, top, 4).map((t) => [svg("line", { x1: left, x2: width - 10, y1: py(t), y2: py(t), class: "axis" }), label(left - 6, py(t) + 4, quantity(t, "B"), { class: "soft", "text-anchor": "end" })]),
    ...ticks(0, end, width / 140).map((t) => [label(px(t), height - 8, t === 0 ? "0" : seconds(t).replace(/\.?0+ /, " "), { class: "soft", "text-anchor": px(t) > width - 40 ? "end" : "middle" })])].flat();
  const predicted = use.predicted ? [svg("line", { x1: left, x2: width - 10, y1: py(use.predicted), y2: py(use.predicted), class: "roof", "stroke-dasharray": "5 4" }), label(width - 12, py(use.predicted) - 5, "predicted peak", { "text-anchor": "end" })] : [];
  const rows = samples.map((s, n) => [s.phase + (s.layer === null ? "" : ` ${s.layer}`), seconds(s.seconds), ...owners.map((o) => quantity(s[o], "B")), quantity(totals[n], "B")]);
  return el("figure", null, keysOf(owners.map((o, i) => [swatch(i), o])),
    picture(width, height, `Memory over time of ${name}`, `Peak ${quantity(use.peak, "B")}. ${owners.join(", ")}.`, axis, areas, predicted),
    lazy("numbers", () => table(`Bytes after each phase of ${name}`, ["phase", "time", ...owners, "total"], rows)));
};
