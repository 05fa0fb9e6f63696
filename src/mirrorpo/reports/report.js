"use strict";
// What lies under the pointer: a line at the nearest drawn step, a dot on each curve, and the values in words.
// Arrow keys do the same for a chart that has the focus. Without this script the page loses nothing else.
for (const plot of document.querySelectorAll(".plot")) {
  const data = plot.dataset;
  const steps = data.steps.split(",").map(Number);
  const from = Number(data.from), to = Number(data.to);
  const low = Number(data.low), high = Number(data.high), log = data.log === "1";
  const curves = [...plot.querySelectorAll("[data-values]")].map((path) => ({
    label: path.dataset.label, unit: path.dataset.unit, values: path.dataset.values.split(","), colour: path.classList[1],
  }));
  const height = plot.querySelector("svg").getAttribute("height");
  let current = -1, marks = null;

  const add = (parent, kind, name) => {
    const element = document.createElement(kind);
    element.className = name;
    parent.append(element);
    return element;
  };
  const across = (step) => (step - from) / (to - from);
  const up = (text, unit) => {
    const value = Number(text) / (unit === "%" ? 100 : 1);
    return log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  };
  const hide = () => { marks?.remove(); marks = null; current = -1; };
  const show = (index) => {
    if (index === current) return;
    hide();
    current = index;
    marks = add(plot, "div", "marks");
    const share = across(steps[index]);
    add(marks, "div", "cross").style.left = `${100 * share}%`;
    const box = add(marks, "div", "tip");
    add(box, "strong", "").textContent = `step ${steps[index].toLocaleString("en")}`;
    for (const { label, unit, values, colour } of curves) {
      const text = values[index];
      const row = add(box, "div", `row ${colour}`);
      row.textContent = `${label ? label + " " : ""}${text === "" ? "–" : text + unit}`;
      const height_share = up(text, unit);
      if (text === "" || !(height_share >= -0.001)) continue;
      const dot = add(marks, "div", `point ${colour}`);
      dot.style.left = `${100 * share}%`;
      dot.style.top = `${height * (1 - height_share)}px`;
    }
    box.style[share > 0.5 ? "right" : "left"] = `calc(${100 * (share > 0.5 ? 1 - share : share)}% + 12px)`;
  };
  const nearest = (event) => {
    const area = plot.getBoundingClientRect();
    const step = from + (to - from) * (event.clientX - area.left) / area.width;
    let best = 0;
    steps.forEach((candidate, i) => { if (Math.abs(candidate - step) < Math.abs(steps[best] - step)) best = i; });
    return best;
  };
  plot.addEventListener("pointermove", (event) => show(nearest(event)));
  plot.addEventListener("pointerdown", (event) => show(nearest(event)));
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!by) return;
    event.preventDefault();
    const start = current < 0 ? (by > 0 ? -1 : steps.length) : current;
    show(Math.min(steps.length - 1, Math.max(0, start + by)));
  });
}
