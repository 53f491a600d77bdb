const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const draw = {};
let unique = 0;

/* Elements are built from names and text only; data never becomes markup. */
const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
};
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/* As tables.quantity in Python. */
const quantity = (amount, unit = "") => {
  const prefixes = ["", "k", "M", "G", "T", "P"];
  let i = 0;
  while (Math.abs(amount) >= 999.5 && i < 5) { amount /= 1000; i += 1; }
  const digits = i === 0 && Number.isInteger(amount) ? 0 : Math.max(0, 3 - String(Math.trunc(Math.abs(amount))).length);
  return `${amount.toFixed(digits)} ${prefixes[i]}${unit}`.trim();
};
const seconds = (s) => (s >= 1 ? `${s.toFixed(2)} s` : s >= 1e-3 ? `${(1e3 * s).toFixed(2)} ms` : `${(1e6 * s).toFixed(1)} µs`);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const number = (x) => (x === null ? "–" : String(x));

/* A token as text in which spaces and line ends can be seen. */
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";
const token = (text) => el("span", { class: "token", text: visible(text) });

const equation = (text) => {
  const node = el("span", { class: "eq" });
  for (const part of text.split(/(->|,|\.\.\.)/)) {
    if (/^[A-Za-z]+$/.test(part)) {
      for (const letter of part) node.append(el("b", { "data-letter": letter, text: letter }));
    } else if (part) node.append(el("span", { class: "punct", text: part === "->" ? " → " : part === "," ? ", " : part }));
  }
  return node;
};

const cell = (value) => (value instanceof Node ? value : String(value));
const table = (caption, headings, rows, left = 1, className = "") =>
  el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    el("table", { class: className },
      el("caption", { text: caption }),
      el("thead", null, el("tr", null, headings.map((h, i) => el("th", { scope: "col", class: i >= left ? "number" : null }, cell(h))))),
      el("tbody", null, rows.map((row) => el("tr", null, row.map((value, i) => el(i ? "td" : "th", { scope: i ? null : "row", class: i >= left ? "number" : null }, cell(value))))))));

/* Details whose content is built when they are opened, or printed. */
const lazy = (summary, build) => {
  const node = el("details", null, el("summary", { text: summary }));
  node.addEventListener("toggle", () => { if (node.open && node.children.length === 1) node.append(build()); });
  return node;
};

const select = (label, options, chosen, change) => {
  const id = `select-${unique++}`;
  const node = el("select", { id, onchange: () => change(node.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen), text })));
  return el("label", { for: id }, label, node);
};

/* A figure with a title and a description for screen readers, and its numbers as a table. */
const picture = (width, height, title, description, ...children) => {
  const id = `svg-${unique++}`;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": `${id}-t ${id}-d` },
    svg("title", { id: `${id}-t`, text: title }), svg("desc", { id: `${id}-d`, text: description }), ...children);
};
const label = (x, y, text, attributes = {}) => svg("text", { x, y, ...attributes, text });
const widthOf = (node, most = 1100) => Math.max(280, Math.min(most, node.clientWidth || 800));

/* Draw now, and again when the width changes. */
const responsive = (node, render) => {
  let last = 0;
  const run = () => {
    const width = widthOf(node);
    if (width === last) return;
    last = width;
    node.replaceChildren(render(width));
  };
  run();
  if (window.ResizeObserver) new ResizeObserver(run).observe(node);
};
