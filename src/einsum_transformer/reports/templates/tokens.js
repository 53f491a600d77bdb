const word = (run, id) => run.vocabulary[String(id)] ?? String(id);

draw.prompt = (run, node) => {
  const shown = Math.min(run.prompt_tokens, run.tokens.length);
  node.append(run.tokens.slice(0, shown).map((t) => t.text).join(""));
  if (run.prompt_tokens > shown) node.append(el("em", { text: ` … (${run.prompt_tokens - shown} more tokens of the prompt are left out) ` }));
};

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
/* The weight of key s for query t of a head: only keys up to the query are stored. */
const weightsOf = (run, layer) => {
  const n = run.attention.tokens, size = n * (n + 1) / 2, all = bytes(run.attention.layers[layer]);
  return { heads: run.attention.heads[layer], n, at: (head, t, s) => (s > t ? 0 : all[head * size + t * (t + 1) / 2 + s]) };
};

const rgb = (name) => {
  const probe = el("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
};
const paint = (canvas, weights, head) => {
  const n = weights.n, context = canvas.getContext("2d"), image = context.createImageData(n, n);
  const paper = rgb("--paper"), ink = rgb("--weight");
  for (let t = 0; t < n; t++) for (let s = 0; s < n; s++) {
    const share = (weights.at(head, t, s) / 255) ** 0.4, at = 4 * (t * n + s);
    for (let c = 0; c < 3; c++) image.data[at + c] = paper[c] + (ink[c] - paper[c]) * share;
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
};
const repaints = new Set();
const repaintAll = () => repaints.forEach((run) => run());

draw.attention = (run, node) => {
  if (!run.attention.layers.length) { node.append(el("p", { class: "note", text: "This model has no attention weights to show." })); return; }
  const state = { layer: 0, head: 0, query: run.attention.tokens - 1 };
  const heads = el("div", { class: "heads" }), large = el("div", { class: "large" });
  const layers = run.attention.layers.map((_, i) => [i, i]);
  const show = () => {
    const weights = weightsOf(run, state.layer);
    state.head = Math.min(state.head, weights.heads - 1);
    const buttons = Array.from({ length: weights.heads }, (_, head) => {
      const canvas = el("canvas", { width: weights.n, height: weights.n, "aria-hidden": "true" });
      paint(canvas, weights, head);
      const button = el("button", { type: "button", "aria-pressed": String(head === state.head), tabindex: head === state.head ? "0" : "-1", "aria-label": `layer ${state.layer}, head ${head}` }, canvas, `head ${head}`);
      button.addEventListener("click", () => { state.head = head; buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button))); rove(buttons, button); enlarge(run, large, weights, state); });
      button.addEventListener("keydown", (event) => move(event, buttons, button));
      return button;
    });
    heads.replaceChildren(...buttons);
    enlarge(run, large, weights, state);
  };
  repaints.add(show);
  node.append(el("div", { class: "controls" }, select("layer", layers, 0, (v) => { state.layer = Number(v); show(); })), heads, large);
  show();
};

const enlarge = (run, node, weights, state) => {
  const { layer, head } = state, n = weights.n;
  const name = `layer ${layer}, head ${head}`;
  const canvas = el("canvas", { width: n, height: n, role: "img", "aria-label": `Attention weights of ${name}, ${n} queries by ${n} keys. The strongest keys of a query are in the table.` });
  paint(canvas, weights, head);
  const readout = el("p", { class: "readout", text: "Rows are queries, columns are keys; darker (lighter in dark mode) is more." });
  const list = el("div");
  const show = (t) => {
    state.query = t;
    const keys = Array.from({ length: t + 1 }, (_, s) => [s, weights.at(head, t, s) / 255]).sort((a, b) => b[1] - a[1]).slice(0, 8);
    list.replaceChildren(table(`Strongest keys of query ${t} in ${name}`, ["key", "token", "weight"],
      keys.map(([s, w]) => [s, token(run.tokens[s].text), w.toFixed(3)]), 2));
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const part = (x, whole) => Math.min(n - 1, Math.max(0, Math.floor(x / whole * n)));
    return [part(event.clientY - box.top, box.height), part(event.clientX - box.left, box.width)];
  };
  canvas.addEventListener("pointermove", (event) => {
    const [t, s] = at(event);
    readout.textContent = `${visible(run.tokens[t].text)} (${t}) attends to ${visible(run.tokens[s].text)} (${s}): ${(weights.at(head, t, s) / 255).toFixed(3)}`;
  });
  const chooser = select("query", run.tokens.slice(0, n).map((t, i) => [i, `${i}: ${visible(t.text)}`]), state.query, (v) => show(Number(v)));
  canvas.addEventListener("click", (event) => { const [t] = at(event); chooser.querySelector("select").value = t; show(t); });
  show(state.query);
  node.replaceChildren(el("figure", null, el("figcaption", { text: `Attention of ${name}` }), canvas, readout), el("div", null, el("div", { class: "controls" }, chooser), list));
};

const probable = (run, ids, probabilities) => ids.map((id, i) => {
  const bar = el("i", { "aria-hidden": "true" });
  bar.style.width = `${Math.max(1, 60 * (probabilities[i] ?? 0)).toFixed(1)}px`;
  return el("span", { class: "probability" }, bar, token(word(run, id)), number(probabilities[i]));
});

draw.next = (run, node) => {
  if (!run.next_tokens.length) { node.append(el("p", { class: "note", text: "No new token was generated." })); return; }
  node.append(table("New tokens and the most probable tokens at each position", ["position", "chosen", "probability", "most probable"],
    run.next_tokens.map((t) => [t.position, token(word(run, t.chosen)), number(t.probability),
      el("span", null, probable(run, t.predicted.ids.slice(0, 5), t.predicted.probabilities))]), 4));
};

/* Positions that a printed table has side by side. */
const PRINTED = 16;
draw.lens = (run, node) => {
  const layers = run.lens.ids.length, shown = run.tokens.length, order = Array.from({ length: layers }, (_, i) => layers - 1 - i);
  const holder = el("div");
  const show = (t) => holder.replaceChildren(table(`Predictions after position ${t} (${visible(run.tokens[t].text)}), by layer`, ["layer", "most probable next tokens"],
    order.map((layer) => [layer, el("span", null, probable(run, run.lens.ids[layer][t], run.lens.probabilities[layer][t]))]), 2));
  node.append(el("div", { class: "controls" }, select("position", run.tokens.map((t, i) => [i, `${i}: ${visible(t.text)}`]), Math.min(run.prompt_tokens, shown) - 1, (v) => show(Number(v)))), holder);
  show(Math.min(run.prompt_tokens, shown) - 1);
  const part = (first, last) => {
    const box = table("Most probable next token after each layer (rows) at each position (columns); the colour is its probability",
      ["layer", ...run.tokens.slice(first, last).map((t, i) => el("span", null, `${first + i} `, token(t.text)))],
      order.map((layer) => [layer, ...run.lens.ids[layer].slice(first, last).map((ids) => token(word(run, ids[0])))]), shown + 1, "lens");
    box.querySelectorAll("tbody tr").forEach((row, y) => row.querySelectorAll("td").forEach((td, i) => {
      const t = first + i, p = run.lens.probabilities[order[y]][t][0];
      td.style.setProperty("--p", p ?? 0);
      td.setAttribute("title", `layer ${order[y]}, position ${t}: ${number(p)}`);
    }));
    return box;
  };
  const whole = el("div", { class: shown > PRINTED ? "screen-only" : null }, part(0, shown)), printed = el("div", { class: "print-only" });
  node.append(el("h4", { text: "All positions" }), whole, printed);
  if (shown > PRINTED) window.addEventListener("beforeprint", () => { for (let t = 0; !printed.dataset.built && t < shown; t += PRINTED) printed.append(part(t, t + PRINTED)); printed.dataset.built = "1"; });
};
