document.querySelectorAll("td[data-equation]").forEach((td) => { if (/->/.test(td.textContent)) td.replaceChildren(equation(td.textContent)); });
document.querySelectorAll("[data-draw]").forEach((node) => draw[node.dataset.draw](data.runs[Number(node.dataset.run)], node));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaintAll);
window.addEventListener("beforeprint", () => {
  repaintAll();
  document.querySelectorAll("details[data-print]").forEach((d) => { d.open = true; });
});
window.addEventListener("afterprint", repaintAll);
