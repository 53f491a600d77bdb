draw.cascade = (run, node) => {
  const holder = el("div");
  const count = run.program.model.num_hidden_layers;
  const state = { stage: 0, layer: 0 };
  const show = () => holder.replaceChildren(cascade(run, run.stages[state.stage], state.layer));
  const kinds = layerKinds(run.stages[0]);
  const controls = el("div", { class: "controls" },
    select("stage", run.stages.map((s, i) => [i, stageName(s)]), 0, (v) => { state.stage = Number(v); show(); }),
    select("layer", Array.from({ length: count }, (_, i) => [i, i]), 0, (v) => { state.layer = Number(v); show(); }),
    el("span", { class: "note", text: kinds.length === 1 ? `All ${count} layers run the same equations.`
      : `Layers of one kind run the same equations: ${kinds.map(ranges).join(" | ")}.` }));
  show();
  node.append(controls, holder);
};

const stageName = (s) => `${s.name} (${s.tokens} ${s.tokens === 1 ? "token" : "tokens"}${s.context > s.tokens ? ` after ${s.context - s.tokens}` : ""})`;
const layerKinds = (stage) => [...new Map(stage.groups.filter((g) => g.layers.length).map((g) => [g.layers.join(), g.layers])).values()];

const cascade = (run, stage, layer) => {
  const list = el("ul", { class: "cascade", "aria-label": `Steps of ${stage.name}, layer ${layer}` });
  const buttons = [];
  const panel = el("li", { class: "detail", id: `detail-${unique++}`, tabindex: "-1" });
  let open = null;
  const slowest = Math.max(1e-12, ...stage.steps.map((s) => measuredRow(run, stage, s)?.p50 || 0));

  const place = (group) => {
    let last = group;
    while (last.nextElementSibling && last.nextElementSibling !== panel && last.nextElementSibling.offsetTop === group.offsetTop) last = last.nextElementSibling;
    last.after(panel);
  };
  const toggle = (button, group, step, visit) => {
    if (open) open.setAttribute("aria-expanded", "false");
    panel.remove();
    if (open === button) { open = null; return; }
    open = button;
    button.setAttribute("aria-expanded", "true");
    panel.replaceChildren(detail(run, stage, step, step.layers.length ? layer : null, visit));
    place(group);
  };

  for (const group of stage.groups) {
    if (group.layers.length && !group.layers.includes(layer)) continue;
    const item = el("li", { class: "group" }, el("h3", { text: group.label === "residual" ? "+ residual" : group.label }));
    for (const index of group.steps) {
      const step = stage.steps[index];
      const row = measuredRow(run, stage, step);
      const button = el("button", { type: "button", class: step.equation ? "step" : "step elementwise", "aria-expanded": "false",
        "aria-controls": panel.id, tabindex: buttons.length ? "-1" : "0" },
        el("span", { class: "role", text: step.role }), step.equation ? equation(step.equation) : null,
        row && step.equation ? el("span", { class: "bar", style: null, "aria-hidden": "true" }) : null);
      const bar = button.querySelector(".bar");
      if (bar) bar.style.width = `${(100 * row.p50 / slowest).toFixed(1)}%`;
      button.addEventListener("click", () => { rove(buttons, button); toggle(button, item, step, group.visit); });
      button.addEventListener("keydown", (event) => {
        if (event.key === "Escape" && open === button) toggle(button, item, step, group.visit);
        else move(event, buttons, button);
      });
      buttons.push(button);
      item.append(button);
    }
    list.append(item);
  }
  return el("div", null, list, el("p", { class: "note", text: "The line below an equation is its median time, relative to the slowest one of the stage." }));
};

/* One tab stop for all steps; arrow keys move between them. */
const rove = (buttons, chosen) => buttons.forEach((b) => b.setAttribute("tabindex", b === chosen ? "0" : "-1"));
const move = (event, buttons, button) => {
  const i = buttons.indexOf(button);
  const next = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (next === undefined || !buttons[next]) return;
  event.preventDefault();
  rove(buttons, buttons[next]);
  buttons[next].focus();
};
